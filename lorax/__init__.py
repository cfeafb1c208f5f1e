"""lorax: fine-tuning, what happens to the weights? The whole public API is re-exported here."""
