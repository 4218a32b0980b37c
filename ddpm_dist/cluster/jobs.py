"""Ray jobs that a job starts beside itself, on the same cluster and with the same working directory."""

import logging

import ray
from ray.job_submission import JobStatus, JobSubmissionClient

log = logging.getLogger(__name__)

_LIVE = (JobStatus.PENDING, JobStatus.RUNNING)


def submit_beside(entrypoint: str) -> str | None:
    """Starts a command as a Ray job of its own and returns its id; None where that can't be done, which is said.

    A job with this command that is alive is not started twice. Nobody waits for it, and its end ends nothing.
    Only call it when Ray is connected. The command's credentials are those of the head node's environment.
    """
    working_dir = ray.get_runtime_context().runtime_env.get("working_dir")
    try:
        client = JobSubmissionClient()
        for job in client.list_jobs():
            if job.entrypoint == entrypoint and job.status in _LIVE:
                return str(job.submission_id)
        runtime_env = {"working_dir": working_dir} if working_dir else {}
        return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
    except Exception as error:  # whatever keeps it from starting must not keep the caller from its own work
        log.warning("not started beside this job: %s: %s", entrypoint, str(error).strip().splitlines()[-1:])
        return None
