"""Digits as people draw, photograph and print them, and the page in the browser that reads them."""

import numpy as np
import pytest
import torch
from conftest import REAL_DATA, ROOT, load_lesson
from drawings import KINDS, make_pictures, read


# PICTURES: a hundred of each kind. The kinds, ranges and seeds stand in drawings.py.
@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The network of intermediate/02, as it is in models/, or trained now."""
    path = ROOT / "models" / "mnist_cnn.pth"
    if not (REAL_DATA and path.exists()):
        lesson = load_lesson("intermediate/02_cnn")
        lesson.ROOT = tmp_path_factory.mktemp("course")
        for name in ("data", "scripts"):
            (lesson.ROOT / name).symlink_to(ROOT / name)
        lesson.main()
        path = lesson.ROOT / "models" / "mnist_cnn.pth"
    return load_lesson("advanced/03_inference_pipeline").MNISTInferencePipeline(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_pictures_of_each_kind_are_read(pipeline, kind):
    pictures, labels = make_pictures(kind)
    if not pictures:
        pytest.skip("matplotlib finds no font that it does not bring")
    right = np.equal(read(pipeline, pictures), labels).sum()
    least = KINDS[kind][1]
    assert right >= (least if REAL_DATA else least - 10)  # 4,000 images teach less than 60,000


@pytest.mark.skipif(not REAL_DATA, reason="the real MNIST is not in data/")
def test_what_is_mnist_already_stays_right(pipeline):
    lesson = load_lesson("advanced/03_inference_pipeline")
    images, labels = lesson.load_mnist(train=False)
    answers = [result["digit"] for result in pipeline.predict_batch(list(images.cpu()))]
    assert np.equal(answers, labels.tolist()).mean() >= 0.988
    assert torch.is_tensor(images)
