from cil.sinks.base import Place, Sink, Sinks, missing, scalars, sinks

__all__ = ["Place", "Sink", "Sinks", "missing", "scalars", "sinks"]
