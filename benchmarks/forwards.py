"""Evaluations for a sampler of ComfyUI's beside the engine's own steps: the same model, size and GPUs in one call.

    python benchmarks/forwards.py --folder /scratch/wan --model t2v-A14B --gpus 2 1 --guidance off cfg

For each number of GPUs and way of guidance: a job of --steps own steps, then a sampling of as many evaluations on
processes of its own, then a second one on the same processes, warm. A step evaluates the model once, or twice where it
is guided, as ComfyUI stacks the two; what is sent and comes back is all of the latents. Each prints a line, and
appends it to benchmarks/results.jsonl. On a machine without a GPU, with `--model tiny`, the same runs on CPU processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pack import RESULTS, append_results, mount_pack
from random_models import write_model
from real_jobs import Shape, make_inputs, make_job

if TYPE_CHECKING:
    from wan_pack.distributed.job.job import ForwardsJob, Job

GUIDANCE = ("off", "cfg", "ulysses")
"""One pass a step; two, on half of the GPUs each; two, one after the other on all."""
KEEP_WARM = 900.0


class Runner:
    """Both on one number of GPUs."""

    def __init__(self, arguments: argparse.Namespace, gpus: int) -> None:
        from wan_pack.distributed.launch.group_evaluator import GroupEvaluators
        from wan_pack.distributed.launch.pool import Pool
        from wan_pack.distributed.machine.gpus import choose_gpus

        self.folder, self.steps, self.pool = arguments.folder, arguments.steps, Pool()
        self.gpus, self.gpu_ids = choose_gpus(gpus)
        self.places: dict[str, Any] = {"parent": self.folder / "jobs", "failed": self.folder / "failed"}
        self.source = GroupEvaluators(self.pool, **self.places)

    def own_steps(self, shape: Shape, job: Job) -> list[float]:
        """Seconds of each."""
        from safetensors.torch import save_file
        from wan_pack.distributed.launch.launcher import run_job

        result = run_job(job, lambda path: save_file(make_inputs(shape), path), pool=self.pool, **self.places)
        result.remove()
        return result.info["step_seconds"]

    def evaluations(self, shape: Shape, job: ForwardsJob) -> tuple[list[float], dict[str, Any]]:
        """Seconds of each, the first with all that comes before it; and what the ranks say."""
        import torch
        from wan_pack.distributed.job.evaluator import SampleConditioning

        inputs = make_inputs(shape)
        prompts = [inputs["context"], inputs["context_null"]] if shape.guided else [inputs["context"]]
        samples = [SampleConditioning(text=text, conditional=at == 0) for at, text in enumerate(prompts)]
        x = inputs["samples"].float().expand(len(samples), *inputs["samples"].shape).contiguous()
        seconds, start = [], time.perf_counter()
        evaluator = self.source.open(job)
        try:
            for step in range(self.steps):
                timesteps = torch.full((len(samples),), 1000.0 * (1 - step / self.steps))
                evaluator.evaluate(x, timesteps, samples)
                seconds.append(time.perf_counter() - start)
                start = time.perf_counter()
        finally:
            evaluator.close()
        assert evaluator.result is not None, "the sampling went well"
        return seconds, evaluator.result.info

    def line(self, shape: Shape, guidance: str) -> dict[str, Any]:
        from wan_pack.distributed.job.job import ForwardsJob

        job = make_job(
            self.folder, shape, self.gpu_ids, self.gpus, cfg_parallel=guidance == "cfg", keep_warm_seconds=KEEP_WARM,
            decode=False,
        )  # fmt: skip
        # One expert does all steps, as one sampler's model does.
        job = dataclasses.replace(job, model=dataclasses.replace(job.model, low_noise=()))
        forwards = ForwardsJob(id=job.id, model=job.model.high_noise, parallel=job.parallel)
        own = self.own_steps(shape, job)
        cold, _ = self.evaluations(shape, forwards)
        warm, info = self.evaluations(shape, forwards)
        step, evaluation = statistics.median(own[1:]), statistics.median([*cold[1:], *warm[1:]])
        on_ranks = statistics.median(info["step_seconds"][1:])
        return {
            "benchmark": "forwards", "model": shape.model, "gpus": self.gpus, "size": "x".join(map(str, shape.pixels)),
            "guidance": guidance, "steps": self.steps, "own_step": round(step, 4), "evaluation": round(evaluation, 4),
            "on_ranks": round(on_ranks, 4), "more_percent": round(100 * (evaluation / step - 1), 2),
            "first_cold": round(cold[0], 3), "first_warm": round(warm[0], 3), "own_steps": [round(s, 4) for s in own],
            "evaluations": [round(s, 4) for s in [*cold, *warm]], "settings": info["settings"],
            "command": " ".join(["python", "benchmarks/forwards.py", *sys.argv[1:]]),
        }  # fmt: skip


def summary(line: dict[str, Any]) -> str:
    what = f"{line['gpus']} GPU {line['model']} {line['size']} guidance {line['guidance']}"
    evaluation = f"{line['evaluation']} s ({line['more_percent']:+.1f} %; on the ranks {line['on_ranks']} s)"
    first = f"first {line['first_cold']} s cold, {line['first_warm']} s warm"
    return f"{what}: own step {line['own_step']} s, evaluation {evaluation}, {first}"


def main(texts: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random weights and the jobs go")
    parser.add_argument("--model", default="t2v-A14B", help="one that takes no pictures")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--size", default="480p", help="480p, 720p or WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--guidance", nargs="+", default=["off"], choices=GUIDANCE)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(texts)
    mount_pack()
    write_model(arguments.folder, arguments.model)
    for gpus in arguments.gpus:
        runner = Runner(arguments, gpus)
        try:
            for guidance in arguments.guidance:
                shape = Shape(arguments.model, arguments.size, arguments.steps, guided=guidance != "off")
                line = runner.line(shape, guidance)
                append_results(line, arguments.results)
                print(summary(line), flush=True)
        finally:
            runner.pool.release()


if __name__ == "__main__":
    main()
