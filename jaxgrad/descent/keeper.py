"""Keep a run: resume it from its checkpoint, save it as it goes, and end it where the system asks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from jaxgrad import parallel
from jaxgrad.descent import checkpoint as saved
from jaxgrad.descent import identity
from jaxgrad.descent.checkpoint import Checkpoint
from jaxgrad.descent.course import Course
from jaxgrad.descent.job import Job
from jaxgrad.descent.placement import Placement
from jaxgrad.descent.schedule import Mark


class Keeper(NamedTuple):
    """A checkpoint and the fingerprint of the run that may write to it. Without a checkpoint nothing is kept."""

    checkpoint: Checkpoint | None
    fingerprint: dict[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint | None, job: Job, rows: Placement) -> "Keeper":
        """Raises an error if the checkpoint cannot be written."""
        if checkpoint is None:
            return cls(None, {})
        parallel.together(lambda: saved.check(checkpoint) if parallel.is_main() else None)
        objective, data, hash_of_rows = rows.identity
        runs = job.runs
        return cls(
            checkpoint,
            identity.fingerprint(
                objective,
                job.params,
                job.model,
                data,
                rows.n,
                runs.optimizer,
                runs.digest_settings(),
                job.sampling,
                runs.key,
                job.stop,
                hash_of_rows(),
            ),
        )

    @contextmanager
    def keeping(self, course: Course) -> Iterator[Callable[[Mark], None]]:
        """Resume the course if there is a checkpoint. The block gets a function to call at the end of each pause.

        That function raises `parallel.Preempted` where the system asks the run to stop.
        """
        (checkpoint, fingerprint), log = self, course.log
        if checkpoint is None:
            yield lambda mark: None
            return
        with saved.held(checkpoint), parallel.Interruption() as asked:
            course.expect_records()
            if (found := saved.resumed(checkpoint, log.saved(), fingerprint)) is not None:
                log.resume(found, course.put)

            def keep(mark: Mark) -> None:
                if log.over or mark.saved:
                    saved.save(checkpoint, log.saved(), fingerprint)
                if not log.over and asked() and not mark.last:
                    saved.save(checkpoint, log.saved(), fingerprint)
                    raise parallel.Preempted(mark.step, checkpoint.path)

            yield keep
