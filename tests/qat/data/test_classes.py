"""Classes are compared by name: another order is matched, another name is one line."""

import pytest
from PIL import Image

from qat.data.classes import ClassNames, relabelled
from qat.data.sources import Source, aligned, subset

CATS = ("cat", "dog", "owl")


def source(labels: list[int], names: ClassNames) -> Source:
    return Source(lambda i: Image.new("L", (1, 1)), labels, 3, class_names=names)


def test_labels_follow_the_names_into_another_order() -> None:
    found = relabelled([0, 1, 2, 0], ("owl", "cat", "dog"), CATS, "it")
    assert list(found) == [2, 0, 1, 2]


@pytest.mark.parametrize("names", [(None, CATS), (CATS, None), (CATS, CATS)])
def test_labels_stay_where_a_side_has_no_names_or_both_agree(names: tuple) -> None:
    assert relabelled([2, 0], *names, "it") == [2, 0]


def test_classes_may_be_absent_where_not_all_are_asked_for() -> None:
    assert list(relabelled([0, 1], ("cat", "owl"), CATS, "it")) == [0, 2]
    with pytest.raises(ValueError, match=r"it has other classes.* alone has none, it lacks 'dog'"):
        relabelled([0, 1], ("cat", "owl"), CATS, "it", complete=True)


def test_unknown_class_is_refused_with_the_difference() -> None:
    with pytest.raises(ValueError, match="alone has 'kitty', it lacks 'cat'; classes are compared"):
        relabelled([0], ("dog", "kitty", "owl"), CATS, "data.val")
    with pytest.raises(ValueError, match="'1', '10', '11', '12', '13' and 15 more"):
        relabelled([0], tuple(sorted(map(str, range(1, 21)))), CATS, "data.val")


def test_names_stay_with_a_source_and_its_parts() -> None:
    given = source([2, 0, 1], ("owl", "dog", "cat"))
    given.files = ["a.png", "b.png", "c.png"]
    turned = aligned(given, CATS, "it", complete=True)
    assert turned.files == given.files
    assert (list(turned.labels), turned.class_names) == ([0, 2, 1], CATS)
    part = subset(turned, [2, 0])
    assert (part.labels, part.class_names) == ([1, 0], CATS)
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        source([0], ("a", "b"))
