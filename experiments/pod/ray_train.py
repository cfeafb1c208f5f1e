"""`lorax train` on Ray workers: JaxTrainer places them, joins them, and starts all again when one is lost.

    python experiments/pod/ray_train.py --workers 4 --chips 4 --accelerator TPU-V5LITEPOD --topology 4x4 -- \
        --task medical --method lora --batch-size 16 --mesh data=16 --out /shared/runs/mine

What follows `--` are the words of `lorax train`; `--out` is a folder that every worker sees. `--chips 0` runs on CPUs.
Expected: the held-out figures on standard output, as JSON, and the run in OUT. Needs `pip install 'lorax-flax[ray]'`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def train(settings: dict[str, Any]) -> None:
    """One worker's part. Ray has joined it to the others by now; JAX is imported here, not in the driver."""
    import ray.train
    import tyro

    import lorax.distributed as pod
    from lorax.cli.train import Args
    from lorax.io.atomic import write_json
    from lorax.train.runner import run

    args = tyro.cli(Args, args=settings["words"])
    args.config.check()
    if not args.out:
        raise SystemExit("lorax: --out: name the run's folder, one that every worker sees")
    mesh = pod.make_mesh(args.mesh, args.config.batch_size)
    # Always: the first start finds no run and begins one, a restart finds its checkpoints.
    report = run(args.config, Path(args.out), resume=True, mesh=mesh)
    ray.train.report({"loss": report["eval"]["after"]["loss"]})
    if pod.is_main():
        # Ray hands back metrics of checkpoints alone; the driver reads this.
        found = {**report["eval"]["after"], "devices": mesh.size, "processes": pod.process_count()}
        write_json(Path(args.out) / "ray.json", found)


def trainer(
    words: list[str], workers: int, chips: int, accelerator: str | None, topology: str | None, storage: str
) -> Any:
    """The JaxTrainer of a run.

    Args:
        words: of `lorax train`.
        workers: hosts; chips: TPU chips of each, 0 for CPUs.
        accelerator, topology: of the slice, as Ray names them (TPU-V5LITEPOD, 4x4).
        storage: where Ray keeps its own records.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    tpu = {"use_tpu": True, "topology": topology, "accelerator_type": accelerator} if chips else {}
    return JaxTrainer(
        train,
        train_loop_config={"words": words},
        # `use_tpu` is what makes Ray join the workers; on CPUs JAX_PLATFORMS says the rest.
        jax_config=JaxConfig(use_tpu=True),
        scaling_config=ScalingConfig(
            num_workers=workers, resources_per_worker={"TPU": chips} if chips else {"CPU": 1}, **tpu
        ),
        run_config=RunConfig(
            storage_path=storage,
            failure_config=FailureConfig(max_failures=10),
            worker_runtime_env={"env_vars": {"JAX_PLATFORMS": "tpu,cpu" if chips else "cpu"}},
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--chips", type=int, default=4)
    parser.add_argument("--accelerator", default="TPU-V5LITEPOD")
    parser.add_argument("--topology", default="4x4")
    parser.add_argument("--storage", default=str(Path("runs/ray").absolute()))
    parser.add_argument("words", nargs="+", metavar="-- lorax train words")
    args = parser.parse_args()
    trainer(args.words, args.workers, args.chips, args.accelerator, args.topology, args.storage).fit()
    out = args.words[args.words.index("--out") + 1]
    print(json.dumps(json.loads((Path(out) / "ray.json").read_text())))


if __name__ == "__main__":
    main()
