"""The other side of the NF4 benchmark: bitsandbytes on torch, operation by operation.

Run by a Python that has torch and bitsandbytes; it knows nothing of lorax. Requests are lines of JSON.
"""

import ctypes
import os
import time

from peft_worker import serve  # the same folder: this file is run as a script


class Side:
    """A weight, its 4-bit form, and activations."""

    def load(self, threads, size, rows, seed):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        import bitsandbytes  # pyright: ignore[reportMissingImports]
        import numpy
        import torch  # pyright: ignore[reportMissingImports]
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]
        from bitsandbytes.cextension import lib  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        rng = numpy.random.default_rng(seed)
        self.torch, self.bnb, self.functional, self.lib = torch, bitsandbytes, functional, lib
        self.weight = torch.from_numpy(rng.standard_normal((size, size), dtype=numpy.float32))
        self.rows = {n: torch.from_numpy(rng.standard_normal((n, size), dtype=numpy.float32)) for n in rows}
        self.codes, self.state = functional.quantize_4bit(self.weight, compress_statistics=True, quant_type="nf4")
        self.flat = functional.quantize_4bit(self.weight, compress_statistics=False, quant_type="nf4")
        self.out = torch.empty_like(self.weight)
        versions = {m.__name__: m.__version__ for m in (torch, bitsandbytes)}
        capability = torch.backends.cpu.get_cpu_capability()
        return {"versions": versions, "threads": torch.get_num_threads(), "capability": capability}

    def run(self, what):
        """One operation; the time and a number that both sides must agree on."""
        begin = time.perf_counter()
        result = self.operation(what)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "check": float(result.float().abs().mean())}

    def operation(self, what):
        if what == "quantise":
            codes, _ = self.functional.quantize_4bit(self.weight, compress_statistics=True, quant_type="nf4")
            return codes
        if what == "dequantise":
            # The library's own routine into a buffer that exists: no fresh pages on either side.
            pointer, (codes, state) = self.functional.get_ptr, self.flat
            n = ctypes.c_longlong(len(self.weight))
            self.lib.cdequantize_blockwise_cpu_nf4_fp32(
                pointer(codes), pointer(state.absmax), pointer(self.out), ctypes.c_longlong(64), n, n
            )
            return self.out[:1]
        rows = int(what.removeprefix("matmul "))
        with self.torch.no_grad():
            return self.bnb.matmul_4bit(self.rows[rows], self.codes.t(), quant_state=self.state)


if __name__ == "__main__":
    side = Side()
    serve({"load": side.load, "run": side.run})
