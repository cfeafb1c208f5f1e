"""Low-rank changes of many adapters in one product: one meaning (`reference`), backends chosen by the table."""

from lorax_kernels.multi_lora.api import Segments, Table, grouped, multi_lora, segments

__all__ = ["Segments", "Table", "grouped", "multi_lora", "segments"]
