from cil.tasks.sequence import TaskSequence, imagenet100_classes, named_orders, task_sequence

__all__ = ["TaskSequence", "imagenet100_classes", "named_orders", "task_sequence"]
