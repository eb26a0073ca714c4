"""Workers and producers for DataQueue. Those of asyncio are in `dataqueue.aio`."""

from .errors import Cancelled, Error, Reject
from .producer import Batcher, Inserted, Producer, new_task
from .task import Task
from .worker import Worker

__all__ = ["Batcher", "Cancelled", "Error", "Inserted", "Producer", "Reject", "Task", "Worker", "new_task"]
