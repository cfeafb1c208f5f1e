"""Files: written whole or not at all, read without trusting what their headers say."""
