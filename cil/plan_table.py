"""A plan as text; 100 columns are enough for all but very long numbers."""

import re
from collections import Counter
from collections.abc import Sequence

from cil.plan import PhasePlan, Plan, TaskPlan
from cil.progress import duration
from cil.text_table import as_text as table

PHASE_COLUMNS = ["task", "classes", "phase", "samples", "epochs", "steps"]
PHASE_COLUMNS += ["learning", "idle", "M adds", "images/s", "time"]
TASK_COLUMNS = ["after", "parameters", "M adds", "exemplars", "pixels"]
TASK_COLUMNS += ["model", "teacher", "grads", "optim", "activations", "all MB"]
MOST_NAMES = 8  # of parameters without gradient


def as_text(plan: Plan) -> str:
    """Tables of phases and of tasks, what gets no gradient, and the sums."""
    last = plan.tasks[-1]
    blocks = [
        f"{plan.name}: {plan.description}\nmeasured in {plan.place}; nothing was trained and nothing is written\n",
        table(
            PHASE_COLUMNS,
            (_phase_row(number, task, phase) for number, task in enumerate(plan.tasks, 1) for phase in task.phases),
            left=("phase",),
        ),
        "learning, idle: parameters that take gradients, those of them that get none; M adds: million\n"
        "multiply-adds of a training step per image (convolutions, matrix products; gradients, teacher)\n",
        table(TASK_COLUMNS, (_task_row(number, task) for number, task in enumerate(plan.tasks, 1)), left=()),
        "M adds: of the answer to one image; MB of tensors in the largest phase (grads: gradients; optim:\n"
        "state of the optimizer; pixels: of the exemplars, of which only ids are stored)\n",
        *(_idle(phase, len(plan.tasks)) for phase in last.phases if phase.idle),
        _sums(plan),
    ]
    return "\n".join(line.rstrip() for block in blocks for line in block.splitlines()) + "\n"


def _phase_row(number: int, task: TaskPlan, phase: PhasePlan) -> Sequence[str]:
    first = phase is task.phases[0]
    return [
        str(number) if first else "",
        f"{task.labels.start}-{task.labels.stop - 1}" if first else "",
        phase.name,
        _count(phase.num_samples),
        str(phase.epochs),
        _count(phase.num_steps),
        _count(phase.num_trainable),
        _count(phase.num_idle),
        _millions(phase.multiply_adds),
        f"{phase.num_images / phase.seconds:.0f}",
        duration(phase.seconds),
    ]


def _task_row(number: int, task: TaskPlan) -> Sequence[str]:
    phase = task.largest_phase
    sizes = [
        task.exemplar_bytes,
        task.model_bytes,
        task.teacher_bytes,
        phase.gradient_bytes,
        phase.optimizer_bytes,
        phase.activation_bytes,
        task.peak_bytes,
    ]
    return [
        str(number),
        _count(task.num_parameters),
        _millions(task.multiply_adds),
        _count(task.num_exemplars),
        *(_megabytes(size) for size in sizes),
    ]


def _idle(phase: PhasePlan, task: int) -> str:
    """What gets no gradient, numbered parts of the network together."""
    sums: Counter[str] = Counter()
    for name, count in phase.idle.items():
        sums[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name.removeprefix("network."))] += count
    named = [f"  {_count(count):>12}  {name}" for name, count in sums.most_common(MOST_NAMES)]
    rest = sum(sums.values()) - sum(count for _, count in sums.most_common(MOST_NAMES))
    more = [f"  {_count(rest):>12}  in {len(sums) - MOST_NAMES} more"] if rest else []
    return "\n".join([f"without gradient in task {task}, {phase.name}:", *named, *more, ""])


def _sums(plan: Plan) -> str:
    training, reading = plan.training_seconds, plan.reading_seconds
    largest = max(plan.tasks, key=lambda task: task.peak_bytes)
    lines = [
        f"{_count(plan.num_steps)} steps on {_count(plan.num_images)} images; "
        f"{_count(plan.tasks[-1].num_parameters)} parameters in the end; {_megabytes(largest.peak_bytes)} MB at most",
        f"about {duration(training + reading)}: {duration(training)} of training, {duration(reading)} of evaluation "
        "and choice of exemplars",
    ]
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f}" if number < 1e9 else f"{number / 1e6:.0f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size < 1e8 else f"{size / 1e6:.0f}"
