"""What models are trained on: sources, tasks, templates, and DataModules that resume exactly."""

from lit_posttrain.data.judged import PointwiseLabels, StepwiseSupervision
from lit_posttrain.data.mixture import Source
from lit_posttrain.data.preferences import Preferences
from lit_posttrain.data.prompts import VerifiablePrompts
from lit_posttrain.data.supervised import SupervisedExamples
from lit_posttrain.data.tasks import PythonTask, ReasoningGym, Task
from lit_posttrain.data.templates import Example, Template
from lit_posttrain.data.unpaired import UnpairedPreferences

__all__ = [
    "Example",
    "PointwiseLabels",
    "Preferences",
    "PythonTask",
    "ReasoningGym",
    "Source",
    "StepwiseSupervision",
    "SupervisedExamples",
    "Task",
    "Template",
    "UnpairedPreferences",
    "VerifiablePrompts",
]
