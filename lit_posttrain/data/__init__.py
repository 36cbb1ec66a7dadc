"""What models are trained on: sources, tasks, templates, and DataModules that resume exactly."""

from lit_posttrain.data.prompts import VerifiablePrompts
from lit_posttrain.data.tasks import PythonTask, ReasoningGym, Task
from lit_posttrain.data.templates import Example, Template

__all__ = ["Example", "PythonTask", "ReasoningGym", "Task", "Template", "VerifiablePrompts"]
