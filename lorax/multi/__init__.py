"""Many adapters over one base: banks, routing, and training them together."""

from lorax.multi.select import adapter_ids, select
from lorax.multi.slots import adapter_names, add_adapter, compact_bank, remove_adapter, replace_adapter
from lorax.multi.stack import stack, unstack
from lorax.multi.train import bank_optimizer, bank_step, reset_adapter

__all__ = [
    "adapter_ids",
    "adapter_names",
    "add_adapter",
    "bank_optimizer",
    "bank_step",
    "compact_bank",
    "remove_adapter",
    "replace_adapter",
    "reset_adapter",
    "select",
    "stack",
    "unstack",
]
