"""Golden operations of CRD and DOT."""

import torch
from torch import Tensor, nn

from kd import Outputs
from kd.feature.crd import CRD
from kd.optim import DOT
from tests.parity.distillation import Answer, Problem, operation


@operation("crd.steps")
def crd_steps(problem: Problem) -> Answer:
    hp, inputs, params = problem.hp, problem.inputs, problem.params
    num_samples = int(hp["n_data"])
    crd = CRD(
        embedding_width=int(hp["feat_dim"]),
        num_negatives=int(hp["K"]),
        temperature=problem.number("T"),
        momentum=problem.number("momentum"),
        eps=problem.number("eps"),
    ).double()
    ids = torch.arange(num_samples)
    crd.remember(ids, (ids * 2 >= num_samples).long())  # sorted labels: rows are ids
    state = crd.memory.get_extra_state()
    banks = {"student": params["memory_v1"].detach(), "teacher": params["memory_v2"].detach()}
    crd.memory.set_extra_state({**state, **banks})
    logits = torch.zeros(len(inputs["step1_f_s"]), 1)
    crd.connect(Outputs(logits, inputs["step1_f_s"]), Outputs(logits, inputs["step1_f_t"]))
    answer = Answer({})
    losses: list[Tensor] = []
    for step in (f"step{number + 1}" for number in range(int(hp["n_steps"]))):
        for side, letter in (("student", "s"), ("teacher", "t")):
            layer = crd.embeds[side]
            for name in ("weight", "bias"):
                full_name = f"embed_{letter}.linear.{name}"
                leaf = nn.Parameter(params[full_name].detach().clone())
                setattr(layer, name, leaf)
                answer.leaves[f"{step}_{full_name}"] = leaf
        features = inputs[f"{step}_f_s"], inputs[f"{step}_f_t"]
        found = crd.step(*features, inputs[f"{step}_idx"], inputs[f"{step}_contrast_idx"])
        losses.append(found.student_loss + found.teacher_loss)
        answer.out |= {
            f"{step}_out_s": found.student_scores,
            f"{step}_out_t": found.teacher_scores,
            f"{step}_s_loss": found.student_loss,
            f"{step}_t_loss": found.teacher_loss,
            f"{step}_loss": losses[-1],
        }
        z_student, z_teacher = crd.memory.normalizers()
        kept = crd.memory.recall(ids)
        answer.after |= {
            f"{step}_Z_v1": z_student,
            f"{step}_Z_v2": z_teacher,
            f"{step}_memory_v1": kept["student"],
            f"{step}_memory_v2": kept["teacher"],
        }
        if torch.autograd.grad(losses[-1], features[1], retain_graph=True, allow_unused=True)[0] is not None:
            raise AssertionError("the teacher's features got a gradient")
    answer.out["loss"] = torch.stack(losses).sum()  # each step has leaves of its own
    return answer


@operation("dot.steps")
def dot_steps(problem: Problem) -> Answer:
    parameters = {name: nn.Parameter(value.detach().clone()) for name, value in problem.params.items()}
    dot = DOT(parameters.values(), lr=problem.number("lr"), weight_decay=problem.number("weight_decay"))
    # past the class's check: the release has no upper bound for mu + delta and none for the sign of delta
    dot.param_groups[0].update(momentum=problem.number("mu"), delta=problem.number("delta"))
    answer = Answer({})
    for step in (f"step{number + 1}" for number in range(int(problem.hp["n_steps"]))):
        given = [
            [
                problem.inputs[key].detach() if (key := f"{step}_grad_{kind}_{name}") in problem.inputs else None
                for name in parameters
            ]
            for kind in ("task", "kd")
        ]
        dot.step(*given)
        for name, parameter in parameters.items():
            state = dot.state[parameter]
            answer.after |= {f"{step}_{name}_{buffer}": state[buffer].clone() for buffer in state}
            answer.after[f"{step}_{name}"] = parameter.detach().clone()
    return answer
