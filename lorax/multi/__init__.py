"""Many adapters over one base: banks, routing, and training them together."""

from lorax.multi.compact import compact_bank
from lorax.multi.place import bank_state_shardings
from lorax.multi.select import adapter_ids, select
from lorax.multi.slots import adapter_names, add_adapter, remove_adapter, replace_adapter
from lorax.multi.stack import stack, unstack
from lorax.multi.train import bank_optimizer, bank_step, reset_adapter

__all__ = [
    "adapter_ids",
    "adapter_names",
    "add_adapter",
    "bank_optimizer",
    "bank_state_shardings",
    "bank_step",
    "compact_bank",
    "remove_adapter",
    "replace_adapter",
    "reset_adapter",
    "select",
    "stack",
    "unstack",
]
