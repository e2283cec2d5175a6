"""What the doctor found, as text and as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..job.errors import counted

OK, NOTE, WRONG = "ok", "note", "wrong"
MARKS = {OK: " ", NOTE: "!", WRONG: "X"}
MAX_TEXT = 600
"""Characters of one finding: what a broken tool prints has no end."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    topic: str
    text: str
    level: str = OK
    """ok, note (works, but worse than it could) or wrong (jobs fail)."""
    remedy: str = ""
    """What to do about it."""


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order of the probes."""

    findings: Sequence[Finding]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong; notes do not count."""
        return all(finding.level != WRONG for finding in self.findings)

    def verdict(self) -> list[str]:
        """Plain sentences: what is wrong first, then what could be better, each with what to do."""
        count = sum(finding.level == WRONG for finding in self.findings)
        lines = [f"{counted(count, 'thing')} must be put right" if count else "Ready to make videos"]
        for level in (WRONG, NOTE):
            for finding in self.findings:
                if finding.level == level:
                    remedy = f". {finding.remedy}" if finding.remedy else ""
                    lines.append(f"{MARKS[level]} {finding.topic}: {finding.text}{remedy}")
        return lines

    def text(self) -> str:
        """For people."""
        width = max((len(finding.topic) for finding in self.findings), default=0)
        lines = [f"{MARKS[f.level]} {f.topic:{width}}  {f.text}" for f in self.findings]
        return "\n".join([*lines, "", *self.verdict()])

    def data(self) -> dict[str, Any]:
        """For programs."""
        findings = [dataclasses.asdict(finding) for finding in self.findings]
        return {"healthy": self.healthy, "verdict": self.verdict(), "text": self.text(), "findings": findings}


def shortened(findings: Iterable[Finding]) -> list[Finding]:
    """The findings with texts of one bounded line each."""
    return [dataclasses.replace(found, text=" ".join(found.text.split())[:MAX_TEXT]) for found in findings]
