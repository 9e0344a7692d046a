from asyncrl.cli.run import run_generator as run_generator
from asyncrl.cli.run import run_learner as run_learner
from asyncrl.config import Config as Config
from asyncrl.config.loading import load_config as load_config
from asyncrl.errors import AsyncRLError as AsyncRLError
from asyncrl.errors import UserError as UserError
from asyncrl.host.processes import StopSignal as StopSignal
from asyncrl.metrics import read_records as read_records
from asyncrl.rewards.base import Part as Part
from asyncrl.tasks.base import Example as Example
from asyncrl.tasks.base import Task as Task
from asyncrl.tasks.base import load_task as load_task

__version__: str
