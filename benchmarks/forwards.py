"""Evaluations for a sampler of ComfyUI's beside the engine's own steps: the same model, size and GPUs in one call.

    python benchmarks/forwards.py --folder /scratch/wan --model t2v-A14B --gpus 2 1 --guidance off cfg

For each number of GPUs and way of guidance: a job of --steps own steps; then a sampling of as many evaluations on
processes of its own, which later ways of guidance find warm, and a second one on the same processes. With two experts
each of them samples, one after the other. A step evaluates the model once, or twice where it is guided, as ComfyUI
stacks the two; what is sent and comes back is all of the latents. A VACE model's control is sent with the first
evaluation; one more evaluation with another control tells what that takes. Each prints a line, and appends it to
benchmarks/results.jsonl. On a machine without a GPU, with `--model tiny`, the same runs on CPU processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pack import RESULTS, append_results, mount_pack
from random_models import model_config, write_model
from real_jobs import PICTURES, Shape, make_inputs, make_job

if TYPE_CHECKING:
    from torch import Tensor
    from wan_pack.distributed.job.evaluator import SampleConditioning, SampleTold
    from wan_pack.distributed.job.job import ForwardsJob, Job

GUIDANCE = ("off", "cfg", "ulysses")
"""One pass a step; two, on half of the GPUs each; two, one after the other on all."""
KEEP_WARM = 900.0
MOST_PERCENT, MOST_BEFORE = 2.0, 1.0
"""What is asked of it: how much more than an own step an evaluation takes, and the seconds of a warm group's first."""


@dataclass(slots=True)
class Sampled:
    """Seconds of evaluations, and what the ranks say of each sampling."""

    first: list[float] = field(default_factory=list)
    """Of each sampling, with all that comes before it."""
    seconds: list[float] = field(default_factory=list)
    """Of the others."""
    new_control: list[float] = field(default_factory=list)
    """Of those that come with another control."""
    infos: list[dict[str, Any]] = field(default_factory=list)


class Runner:
    """Both on one number of GPUs."""

    def __init__(self, arguments: argparse.Namespace, gpus: int) -> None:
        from wan_pack.distributed.launch.group_evaluator import GroupEvaluators
        from wan_pack.distributed.launch.pool import Pool
        from wan_pack.distributed.machine.gpus import choose_gpus

        self.folder, self.steps, self.experts = arguments.folder, arguments.steps, arguments.experts
        self.pool = Pool()
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

    def conditions(self, shape: Shape) -> tuple[Tensor, list[SampleConditioning]]:
        """What is evaluated, one latent for each prompt, and what each is conditioned on."""
        import torch
        from wan_pack.distributed.job.evaluator import SampleConditioning

        config, inputs = model_config(shape.model), make_inputs(shape)
        prompts = [inputs["context"], inputs["context_null"]] if shape.guided else [inputs["context"]]
        told = {"controls": self.control(shape)} if config.vace_layers else {}
        samples = [SampleConditioning(text=text, told=told, conditional=at == 0) for at, text in enumerate(prompts)]
        latents = inputs["samples"].float()
        # As a picture and its mask stand beside the latents.
        beside = torch.randn(config.in_dim - len(latents), *latents.shape[1:])
        x = torch.cat([latents, beside])
        return x.expand(len(samples), *x.shape).contiguous(), samples

    def control(self, shape: Shape) -> tuple[SampleTold, ...]:
        """Another one in every call."""
        import torch
        from wan_pack.distributed.job.evaluator import SampleTold

        latents = make_inputs(shape, meta=True)["samples"].shape
        return (SampleTold(torch.randn(model_config(shape.model).control_dim, *latents[1:])),)

    def evaluations(self, shape: Shape, jobs: Sequence[ForwardsJob]) -> Sampled:
        """One sampling for each job, as samplers of two experts follow one another."""
        import torch
        from wan_pack.distributed.launch.launcher import new_job_id

        x, samples = self.conditions(shape)
        sampled = Sampled()
        for job in jobs:
            start = time.perf_counter()
            evaluator = self.source.open(dataclasses.replace(job, id=new_job_id()))
            try:
                for step in range(self.steps):
                    timesteps = torch.full((len(samples),), 1000.0 * (1 - step / self.steps))
                    evaluator.evaluate(x, timesteps, samples)
                    (sampled.seconds if step else sampled.first).append(time.perf_counter() - start)
                    start = time.perf_counter()
                if "controls" in samples[0].told:
                    other = {"controls": self.control(shape)}
                    changed = [dataclasses.replace(sample, told=other) for sample in samples]
                    start = time.perf_counter()
                    evaluator.evaluate(x, timesteps, changed)
                    sampled.new_control.append(time.perf_counter() - start)
            finally:
                evaluator.close()
            assert evaluator.result is not None, "the sampling went well"
            sampled.infos.append(evaluator.result.info)
        return sampled

    def job(self, shape: Shape, guidance: str) -> Job:
        job = make_job(
            self.folder, shape, self.gpu_ids, self.gpus, cfg_parallel=guidance == "cfg", keep_warm_seconds=KEEP_WARM,
            decode=False,
        )  # fmt: skip
        if self.experts > 1:
            return job
        # One expert does all steps, as one sampler's model does.
        return dataclasses.replace(job, model=dataclasses.replace(job.model, low_noise=()))

    def line(self, shape: Shape, guidance: str, own: list[float]) -> dict[str, Any]:
        """own: seconds of the engine's own steps."""
        from wan_pack.distributed.job.job import ForwardsJob

        job = self.job(shape, guidance)
        experts = (job.model.high_noise, job.model.low_noise)[: 1 + bool(job.model.low_noise)]
        forwards = [ForwardsJob(id=job.id, model=expert, parallel=job.parallel) for expert in experts]
        cold, warm = self.evaluations(shape, forwards), self.evaluations(shape, forwards)
        step, evaluation = statistics.median(own[1:]), statistics.median([*cold.seconds, *warm.seconds])
        on_ranks = statistics.median(second for info in warm.infos for second in info["step_seconds"][1:])
        # Each a model's first; the worst counts.
        first = max(warm.first)
        line = {
            "benchmark": "forwards", "model": shape.model, "gpus": self.gpus, "size": "x".join(map(str, shape.pixels)),
            "guidance": guidance, "steps": self.steps, "experts": len(experts), "own_step": round(step, 4),
            "evaluation": round(evaluation, 4), "on_ranks": round(on_ranks, 4),
            "more_percent": round(100 * (evaluation / step - 1), 2), "first_cold": round(cold.first[0], 3),
            "first_warm": round(first, 3), "before_first": round(first - evaluation, 3),
            "own_steps": [round(s, 4) for s in own],
            "evaluations": [round(s, 4) for s in [*cold.first, *cold.seconds, *warm.first, *warm.seconds]],
            "settings": warm.infos[0]["settings"],
            "command": " ".join(["python", "benchmarks/forwards.py", *sys.argv[1:]]),
        }  # fmt: skip
        if sent := [*cold.new_control, *warm.new_control]:
            line["new_control"] = round(statistics.median(sent) - evaluation, 3)
        return line


def summary(line: dict[str, Any]) -> str:
    what = f"{line['gpus']} GPU {line['model']} {line['size']} guidance {line['guidance']}"
    evaluation = f"{line['evaluation']} s ({line['more_percent']:+.1f} %; on the ranks {line['on_ranks']} s)"
    first = f"first {line['first_cold']} s cold, {line['first_warm']} s warm"
    control = f", a control's sending {line['new_control']} s" if "new_control" in line else ""
    held = {
        f"at most {MOST_PERCENT:g} % more": line["more_percent"] <= MOST_PERCENT,
        f"warm, {line['before_first']} s before the first step's own time, under {MOST_BEFORE:g} s": line[
            "before_first"
        ]
        < MOST_BEFORE,
        "with it": line["first_warm"] < MOST_BEFORE,
    }
    answers = "; ".join(f"{asked}: {'yes' if holds else 'no'}" for asked, holds in held.items())
    return f"{what}: own step {line['own_step']} s, evaluation {evaluation}, {first}{control}; {answers}"


def main(texts: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random weights and the jobs go")
    parser.add_argument("--model", default="t2v-A14B")
    parser.add_argument("--pictures", default="none", choices=PICTURES, help="that the own job has")
    parser.add_argument("--experts", type=int, default=1, choices=(1, 2), help="2: one after the other, --steps each")
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
        shapes = {
            guidance: Shape(
                arguments.model, arguments.size, arguments.steps, arguments.pictures, guided=guidance != "off"
            )
            for guidance in arguments.guidance
        }
        try:
            # All own jobs first: their processes are not those of samplings, and have the GPUs until these come.
            own = {guidance: runner.own_steps(shape, runner.job(shape, guidance)) for guidance, shape in shapes.items()}
            for guidance, shape in shapes.items():
                line = runner.line(shape, guidance, own[guidance])
                append_results(line, arguments.results)
                print(summary(line), flush=True)
        finally:
            runner.pool.release()


if __name__ == "__main__":
    main()
