"""All errors that a user can cause, or that the cluster can.

DdpmDistError
├── ConfigError              a key, a value or a combination that can't work
├── StorageError             an object store said no, or nothing
│   ├── NotFoundError        no such object, folder or bucket
│   ├── AccessError          credentials that are missing or refused
│   ├── UnreachableError     no answer within the patience that was granted
│   └── ShortReadError       fewer bytes came than were asked for
├── DataError                a data set that can't be used as it is
│   ├── ShardError           a shard that is truncated, altered or missing
│   ├── BadSamplesError      more undecodable samples than data.max_bad_fraction
│   └── LoaderProcessError   a loader process that was killed
├── SnapshotError            a snapshot folder that isn't one, or doesn't fit
├── StateError               a training state that can't be read or doesn't fit
│   └── DamagedStateError    its bytes differ from what its manifest says
├── TrainingError            the run can't go on
│   ├── NonFiniteError       too many steps in a row with a loss or gradient that isn't finite
│   ├── HangError            no step within the heartbeat's limit
│   ├── ClaimError           the run folder belongs to another live attempt
│   └── PreemptedError       a node of this attempt is about to be taken away
├── ClusterError             too few resources, or a Ray that doesn't answer
│   ├── WorkerRefusedError   a worker that can't do a job's tasks as the others do them
│   ├── StandbyError         no standby on this node: processes start by themselves, in seconds
│   └── TaskFailedError      a task that failed wherever it was tried: it is to blame, not the cluster
├── SamplingError            a sampling job that can't be done as asked
└── EvaluationError          a metric that can't be computed as asked

A message says what was wrong, which value, where, and what to do about it.
"""

import re


def without_url_secrets(text: str) -> str:
    """Text without the user:password@ and the query strings of its URLs."""
    text = re.sub(r"(\w+://)[^/@\s]*@", r"\1", text)
    return re.sub(r"(\w+://[^\s?]*)\?[^\s']*", r"\1", text)


class DdpmDistError(Exception):
    """Base of all errors that are shown to the user as one message, without a traceback."""


class ConfigError(DdpmDistError, ValueError):
    """A key, a value or a combination that can't work."""


class StorageError(DdpmDistError):
    """An object store said no, or nothing."""

    status: int | None = None
    """HTTP status of the store's answer, where there was one."""


class NotFoundError(StorageError):
    """No such object, folder or bucket."""


class AccessError(StorageError):
    """Credentials that are missing or refused."""


class UnreachableError(StorageError):
    """No answer within the patience that was granted."""


class ShortReadError(StorageError):
    """Fewer bytes came than were asked for."""


class DataError(DdpmDistError):
    """A data set that can't be used as it is."""


class ShardError(DataError):
    """A shard that is truncated, altered or missing."""


class BadSamplesError(DataError):
    """More undecodable samples than `data.max_bad_fraction` allows."""


class LoaderProcessError(DataError):
    """A loader process that was killed, often for lack of memory; another attempt may fare better."""


class SnapshotError(DdpmDistError):
    """A snapshot folder that isn't one, or doesn't fit."""


class StateError(DdpmDistError):
    """A training state that can't be read or doesn't fit."""


class DamagedStateError(StateError):
    """A training state whose bytes differ from what its manifest says."""


class TrainingError(DdpmDistError):
    """The run can't go on."""


class NonFiniteError(TrainingError):
    """Too many steps in a row with a loss or a gradient that isn't finite."""


class HangError(TrainingError):
    """No step within the heartbeat's limit."""


class ClaimError(TrainingError):
    """The run folder belongs to another live attempt."""


class PreemptedError(TrainingError):
    """A node is about to be taken away; the state is saved, and another attempt goes on without it."""


class ClusterError(DdpmDistError):
    """Too few resources, or a Ray that doesn't answer."""


class WorkerRefusedError(ClusterError):
    """A worker that can't do a job's tasks as the others do them; it is let go, and the task is not to blame."""


class StandbyError(ClusterError):
    """A node's standby can't be started or doesn't answer; processes are then started without it."""


class TaskFailedError(ClusterError):
    """A task that failed wherever it was tried: it is to blame, not the cluster."""


class SamplingError(DdpmDistError):
    """A sampling job that can't be done as asked."""


class EvaluationError(DdpmDistError):
    """A metric that can't be computed as asked."""


def last_line(error: BaseException) -> str:
    """What an error of a library says in its last line, which is the one that tells; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
