"""Everything asyncrl raises on purpose. Each class says when it is raised; each message names the remedy.

`UserError` children are what a user wrote or set up wrongly: the commands print them without a traceback and
exit with the class's `exit_code`. The rest are failures of peers, disks and engines that the daemons handle.
"""

from __future__ import annotations


class AsyncRLError(Exception):
    """Base of all errors raised on purpose."""


class UserError(AsyncRLError, ValueError):
    """What the user wrote cannot work. Printed without a traceback."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key or value is wrong, alone or together with another one."""


class ModelError(UserError):
    """The model folder is missing, incomplete, or does not fit the task or the other daemon."""


class TaskError(UserError):
    """The task cannot be imported or its data cannot be read."""


class BindError(UserError):
    """An address or port cannot be bound."""


class ShapeError(AsyncRLError, ValueError):
    """Tensors or arrays that belong together differ in shape."""


class NonFiniteError(AsyncRLError, ArithmeticError):
    """A NaN or infinity stands where a number is needed. Never replaced by zero."""


class DeadlineExceeded(AsyncRLError, TimeoutError):
    """A wait ended without its event. Names what was waited for, on whom, for how long."""


class ProtocolError(AsyncRLError):
    """A peer sent what the protocol does not allow."""


class FrameError(ProtocolError):
    """A frame is malformed, corrupt or over a limit. Nothing of it was used."""


class PeerUnreachable(AsyncRLError, ConnectionError):
    """A peer did not answer within the configured deadline."""

    exit_code = 3


class Refused(AsyncRLError):
    """The learner refused this generator: fingerprints, protocol or run do not fit."""

    exit_code = 4


class EngineError(AsyncRLError):
    """The rollout engine is dead, tainted or gave garbage."""

    exit_code = 5


class ChannelError(AsyncRLError):
    """A collective of the weight plane failed, or a member vanished in it."""


class RankLost(AsyncRLError):
    """Another trainer rank died or does not answer, so that this one cannot go on."""

    exit_code = 9


class RewardError(AsyncRLError):
    """A reward could not be computed: it raised, hung or was not finite. Never becomes a number."""


class TooManyFailures(AsyncRLError):
    """So many prompts got no group that going on would only burn time: the task or the engine is at fault."""

    exit_code = 8


class JournalError(AsyncRLError):
    """The rollout journal cannot be written or read."""

    exit_code = 6


class CheckpointError(AsyncRLError):
    """A checkpoint could not be written, verified or read. Older ones stay as they were."""

    exit_code = 6


class TrainerFailed(AsyncRLError):
    """The trainer died more often than it may."""

    exit_code = 7
