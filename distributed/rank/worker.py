"""One rank of a job: does its part of whatever kind of work the job is."""

from __future__ import annotations

import logging

import torch

from ..group.group_folder import GroupDir
from ..job.job import ForwardsJob, GroupJob, Job, VaeJob
from ..job.job_folder import JobDir
from .forwards_work import ForwardsWork
from .session import Session, Stopped
from .signs import RankFiles
from .vae_work import VaeWork
from .video_work import VideoWork
from .work import Work

log = logging.getLogger(__name__)


def work_of(job: GroupJob, group: GroupDir, folder: JobDir, files: RankFiles, session: Session) -> Work:
    """What this rank does for a job of this kind."""
    if isinstance(job, Job):
        return VideoWork(job, group, folder, files, session)
    if isinstance(job, VaeJob):
        return VaeWork(job, group, folder, files, session)
    assert isinstance(job, ForwardsJob), type(job)
    return ForwardsWork(job, group, folder, files, session)


def main(group: GroupDir, folder: JobDir, files: RankFiles, session: Session | None) -> Session:
    """Runs this rank (RANK, WORLD_SIZE and LOCAL_RANK from torchrun) of the job in `folder`.

    Args:
        session: what this rank keeps of the group's job before; None for the first.
    """
    job = folder.read_job()
    if session is None:
        with files.span("device and kernels chosen"):
            session = Session.of(job)
    try:
        with torch.no_grad():
            try:
                work_of(job, group, folder, files, session).run()
            except Stopped:
                log.info("stopped: the job is cancelled")
                session.experts.settle()
            session.rest()
    except BaseException as error:
        # Before the group is left: with NCCL that may wait for peers, which wait for this rank.
        files.error(error)
        session.leave()
        raise
    return session
