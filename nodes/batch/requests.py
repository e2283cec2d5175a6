"""What a batch is asked for: prompts x seeds."""

from __future__ import annotations

from dataclasses import dataclass

from ...distributed.job.sampling import MAX_SEED

SEPARATOR = "---"
"""A line of it parts prompts of several lines."""
MAX_VIDEOS = 1000
"""Of one batch: each has its part of the log and its lines in the status."""
SHOWN = 80
"""Characters of a prompt in the status."""


@dataclass(frozen=True, slots=True)
class Request:
    """One video of a batch."""

    prompt: str
    """Empty: text_embeds says what the video shows."""
    seed: int

    def __str__(self) -> str:
        if not self.prompt:
            return f"seed {self.seed}"
        line = " ".join(self.prompt.split())
        return f"seed {self.seed}, {line if len(line) <= SHOWN else line[: SHOWN - 3] + '...'}"


def split_prompts(text: str) -> list[str]:
    """One prompt per line; where a line is `---`, one prompt between each two such lines. Empty ones are left out."""
    lines = text.splitlines()
    if not any(line.strip() == SEPARATOR for line in lines):
        return [line.strip() for line in lines if line.strip()]
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == SEPARATOR:
            blocks.append([])
        else:
            blocks[-1].append(line)
    prompts = ("\n".join(block).strip() for block in blocks)
    return [prompt for prompt in prompts if prompt]


def requests_of(prompts: str, seed: int, count: int, *, embeds_connected: bool) -> list[Request]:
    """Every prompt with the seeds seed, seed + 1, ..., seed + count - 1; all of a prompt's videos in a row.

    Args:
        embeds_connected: the prompt comes as embeddings, so there is one.
    Raises:
        ValueError: there is no prompt, there are too many videos, or a seed would be too large.
    """
    texts = [""] if embeds_connected else split_prompts(prompts)
    if not texts:
        raise ValueError("prompts is empty and text_embeds is not connected: there is nothing to make videos of")
    if len(texts) * count > MAX_VIDEOS:
        raise ValueError(
            f"{len(texts)} prompts and batch_count {count} make {len(texts) * count} videos; "
            f"a batch makes at most {MAX_VIDEOS}"
        )
    if seed + count - 1 > MAX_SEED:
        raise ValueError(f"seed is {seed} and batch_count {count}; the last seed must be at most {MAX_SEED}")
    return [Request(text, seed + offset) for text in texts for offset in range(count)]
