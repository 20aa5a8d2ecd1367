import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import estimator_checks_generator

import cil
from cil import IncrementalClassifier
from cil.cli import main

QUICK = {"learner": "icarl", "model": "resnet8", "memory_size": 20, "epochs": 1, "random_state": 0}


def striped(channels: int = 1, num_classes: int = 4, each: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Images class after class; every class has the pixels of the first in other places, so colours say nothing."""
    first = np.random.default_rng(0).integers(0, 256, (each, channels, 8, 8)).astype(np.uint8)
    return (
        np.concatenate([np.roll(first, (label, 2 * label), axis=(2, 3)) for label in range(num_classes)]),
        np.arange(num_classes).repeat(each),
    )


X, Y = striped()


def learned(images: np.ndarray = X, **parameters: Any) -> IncrementalClassifier:
    """Two tasks of two classes."""
    classifier = IncrementalClassifier(**{**QUICK, **parameters})
    for task in ([0, 1], [2, 3]):
        some = np.isin(Y, task)
        classifier.partial_fit(images[some], Y[some])
    return classifier


@pytest.mark.parametrize(
    ("learner", "model", "kd"), [("icarl", "resnet8", None), ("dkt", "dkt_tiny", None), ("lwf", "resnet8", "kd")]
)
def test_calls_give_the_weights_of_a_run_of_the_command_line(
    tmp_path: Path, learner: str, model: str, kd: str | None
) -> None:
    images, _ = striped(channels=3)  # the strides of a single channel are not those of a file, nor is the last bit then
    arrays = images.transpose(0, 2, 3, 1)
    np.savez(tmp_path / "x.npz", x_train=arrays, y_train=Y, x_test=arrays[::5], y_test=Y[::5])
    words = ["data=npz", f"data.path={tmp_path / 'x.npz'}", "scenario=b0_inc2", f"learner={learner}", f"model={model}"]
    words += ["memory.size=20", "optim.epochs=1", "precision=fp32", f"runs_dir={tmp_path}", "name=run"]
    words += [f"kd={kd}"] if kd else []
    with mock.patch("cil.report.write_report", lambda folder: folder):
        assert main(words) == 0
    run = cil.load(tmp_path / "run")
    classifier = learned(images, learner=learner, model=model, kd=kd)
    ours = classifier.model_.network.state_dict()
    assert run.network.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in run.network.state_dict().items())
    assert np.allclose(classifier.predict_proba(images), run.predict_proba(images).numpy(), atol=1e-6)


def test_of_earlier_tasks_only_the_exemplars_are_kept() -> None:
    classifier = learned()
    assert len(classifier.run_.data.train.images) == len(classifier.run_.memory) == 20
    assert len(learned(learner="joint").run_.data.train.images) == len(X)  # which learns from everything, always
    assert len(learned(learner="finetune").run_.data.train.images) == 0


def test_classes_are_sorted_and_probabilities_are_in_their_order() -> None:
    classifier = IncrementalClassifier(**QUICK)
    names = np.array(["ant", "bee", "cat", "dog"])[Y]
    later = np.isin(Y, [0, 3])
    classifier.partial_fit(X[~later], names[~later])
    assert classifier.classes_.tolist() == ["bee", "cat"]
    classifier.partial_fit(X[later], names[later])
    assert classifier.classes_.tolist() == ["ant", "bee", "cat", "dog"]
    assert classifier.learned_classes_.tolist() == ["bee", "cat", "ant", "dog"]
    shares = classifier.predict_proba(X)
    assert np.allclose(shares.sum(axis=1), 1)
    assert (classifier.classes_[shares.argmax(axis=1)] == classifier.predict(X)).all()
    assert 0 <= classifier.score(X, names) <= 1


def test_classes_to_come_have_the_probability_0() -> None:
    classifier = IncrementalClassifier(**QUICK, config={"memory.budget": "fixed_total"})
    some = Y < 2
    with pytest.raises(ValueError, match="fixed_total divides by the number of all classes"):
        classifier.partial_fit(X[some], Y[some])
    classifier.partial_fit(X[some], Y[some], classes=[0, 1, 2, 3])
    assert (classifier.predict_proba(X)[:, 2:] == 0).all()
    assert classifier.run_.memory.per_class() == {0: 5, 1: 5}
    with pytest.raises(ValueError, match="y holds class 9, not among the classes announced: classes 0, 1, 2, 3"):
        classifier.partial_fit(X[~some], np.where(Y[~some] == 2, 2, 9))
    with pytest.raises(ValueError, match="they are announced in the first one"):
        classifier.partial_fit(X[~some], Y[~some], classes=[0, 1, 2, 3, 4])
    classifier.partial_fit(X[~some], Y[~some])
    assert (classifier.predict_proba(X) > 0).all()


def test_a_class_that_is_known_is_refused_and_nothing_is_lost() -> None:
    classifier = learned()
    before = classifier.predict_proba(X)
    with pytest.raises(ValueError, match="y holds class 3, learned in an earlier call: every class comes in one call"):
        classifier.partial_fit(X, np.where(Y == 0, 3, Y + 10))
    assert (classifier.predict_proba(X) == before).all()
    assert (classifier.fit(X, Y).classes_ == [0, 1, 2, 3]).all()


def test_rows_and_images_of_the_same_pixels_are_the_same() -> None:
    rows, images = (
        IncrementalClassifier(**QUICK).fit(X.reshape(len(X), -1), Y),
        IncrementalClassifier(**QUICK).fit(X, Y),
    )
    assert rows.image_shape_ == images.image_shape_ == (1, 8, 8)
    assert (rows.predict_proba(X) == images.predict_proba(X.reshape(len(X), -1))).all()
    assert rows.n_features_in_ == 64
    wide = IncrementalClassifier(**QUICK, image_shape=(4, 16)).fit(X.reshape(len(X), -1), Y)
    assert wide.image_shape_ == (1, 4, 16)
    with pytest.raises(ValueError, match=r"image_shape=\(4, 4\) does not fit X, rows of 64 features"):
        IncrementalClassifier(**QUICK, image_shape=(4, 4)).fit(X.reshape(len(X), -1), Y)


def test_numbers_are_brought_to_bytes_by_the_range_of_the_first_call() -> None:
    bytes_of = IncrementalClassifier(**QUICK).fit(X, Y)
    scaled = IncrementalClassifier(**QUICK).fit(X / 255.0 - 3, Y)
    assert (bytes_of.predict_proba(X) == scaled.predict_proba(X / 255.0 - 3)).all()
    assert (bytes_of.predict_proba(X) == bytes_of.predict_proba(X.astype(float))).all()


def test_the_same_seed_gives_the_same_bits_and_a_copy_is_whole() -> None:
    classifier = learned()
    assert (learned().predict_proba(X) == classifier.predict_proba(X)).all()
    assert (pickle.loads(pickle.dumps(classifier)).predict_proba(X) == classifier.predict_proba(X)).all()
    assert clone(classifier).get_params() == classifier.get_params()
    assert not hasattr(clone(classifier), "classes_")
    assert (learned(random_state=1).predict_proba(X) != classifier.predict_proba(X)).any()


def test_settings_by_the_names_of_the_config_arrive() -> None:
    more = {"optim.weight_decay": 0.5, "data.augment": {"crop": {"padding": 1}}, "optim.schedule": {"warmup_epochs": 0}}
    config = IncrementalClassifier(**QUICK, lr=0.25, batch_size=7, config=more).fit(X, Y).run_.config
    assert (config.optim.weight_decay, config.optim.lr, config.optim.batch_size) == (0.5, 0.25, 7)
    assert config.data.augment == {"crop": {"padding": 1}}
    assert config.optim.schedule.warmup_epochs == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"learner": "icarll"}, "did you mean 'icarl'"),
        ({"learner": "der", "model": "dkt_tiny"}, "learner=der copies the backbone"),
        ({"config": {"scenario.increment": 2}}, "config: scenario.increment has no effect here"),
        ({"memory_size": 0}, "memory.size is 0"),
    ],
)
def test_what_cannot_be_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IncrementalClassifier(**{**QUICK, **parameters}).fit(X, Y)


def test_the_model_can_be_exported_and_loaded(tmp_path: Path) -> None:
    from cil.export import export

    classifier = learned()
    export(classifier.model_, "safetensors", tmp_path / "m.safetensors")
    assert np.allclose(cil.load(tmp_path / "m.safetensors").predict_proba(X), classifier.predict_proba(X), atol=1e-6)


def test_an_import_of_cil_costs_no_torch() -> None:
    code = "import sys, cil; assert 'torch' not in sys.modules and 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


#: Checks of scikit-learn that do not apply, and why.
DO_NOT_APPLY = {
    "check_fit_score_takes_y": "it calls partial_fit after fit with the same classes, which is refused: every class "
    "comes in one call",
}
#: Learns enough in a few steps to be checked, but not to be good.
CHECKED = IncrementalClassifier("replay", model="resnet8", epochs=1, random_state=0)
#: The check that it learns well takes longer than all others together.
ACCURACY = "check_classifiers_train"
#: Gives the constructor values of wrong types, which the type checks of these tests refuse.
UNTYPED = "check_do_not_raise_errors_in_init_or_set_params"


def name_of(check: Any) -> str:
    name: str = getattr(check, "func", check).__name__
    return name


CHECKS = [check for _, check in estimator_checks_generator(CHECKED)]


@pytest.mark.parametrize(
    "check",
    [check for check in CHECKS if name_of(check) not in {ACCURACY, UNTYPED, *DO_NOT_APPLY}],
    ids=lambda check: name_of(check),
)
@pytest.mark.filterwarnings("default::sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_finds_nothing_wrong(check: Any) -> None:
    check(clone(CHECKED))


def test_the_constructor_takes_anything_as_scikit_learn_wants() -> None:
    code = f"from sklearn.utils.estimator_checks import {UNTYPED} as check; import cil; "
    code += "check('IncrementalClassifier', cil.IncrementalClassifier())"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", DO_NOT_APPLY)
def test_checks_that_do_not_apply_fail_for_the_reason_given(name: str) -> None:
    (check,) = (check for check in CHECKS if name_of(check) == name)
    with pytest.raises(ValueError, match="learned in an earlier call"):
        check(clone(CHECKED))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_scikit_learn_finds_that_it_learns(number: int) -> None:
    check = [check for check in CHECKS if name_of(check) == ACCURACY][number]
    check(clone(CHECKED).set_params(epochs=20, batch_size=16))


@pytest.mark.slow
def test_digits_are_learned_in_tasks() -> None:
    images, labels = load_digits(return_X_y=True)
    classifier = IncrementalClassifier(memory_size=200, epochs=10, random_state=0)
    for first in (0, 5):
        some = (labels[:1400] >= first) & (labels[:1400] < first + 5)
        classifier.partial_fit(images[:1400][some], labels[:1400][some])
    assert classifier.score(images[1400:], labels[1400:]) > 0.85
