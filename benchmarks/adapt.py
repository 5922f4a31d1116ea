"""Methods of adaptation side by side over one stream: errors, and cost relative to inference.

    python benchmarks/adapt.py MODEL.ckpt --recipe configs/tta/cifar10_vit_tiny.yaml \
        --parts tent ttaq_tent --num_images 40

The model left alone answers the stream once; every method is compared with that. Costs are in
processor time of one thread, the forward pass that only the comparison needs not counted.
"""

import argparse
import time

import torch

import qat
from qat.lightning.cli import make_parser
from qat.lightning.commands.adapt import StreamSettings, make_stream
from qat.lightning.commands.common import make_data
from qat.lightning.stream_scores import Scores
from qat.models import num_classes_of
from qat.preprocessing import expected_by
from qat.tta import Adapter, Source

PARTS = "configs/tta/parts"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", help="model.ckpt of quantize or adapt")
    options.add_argument("--recipe", default="configs/tta/cifar10_vit_tiny.yaml")
    options.add_argument("--parts", nargs="+", default=["tent"], help="joined by +, such as a+b")
    options.add_argument("--stream", nargs="*", default=[], help="parts that change the stream")
    options.add_argument("--num_images", type=int, default=40)
    options.add_argument("--batch_size", type=int, default=40)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    torch.set_num_threads(1)
    parser = make_parser()[1]["adapt"]
    model = qat.load(given.model)
    batches, reference, calibration, domains = [], [], [], []
    seconds = 0.0
    for joined in given.parts:
        words = ["--config", given.recipe]
        for part in (*given.stream, *joined.split("+")):
            words += ["--config", f"{PARTS}/{part}.yaml"]
        config = parser.parse_args([*words, "--seed_everything", str(given.seed)])
        objects = parser.instantiate(config)
        if not batches:
            settings = StreamSettings(**dict(objects.stream.items(branches=True, nested=False)))
            settings = StreamSettings(
                **{**vars(settings), "num_images": given.num_images, "batch_size": given.batch_size}
            )
            data = make_data(parser, config)
            data.attach(expected_by(model), num_classes_of(model))
            stream = make_stream(settings, data, model, given.seed)
            batches, domains = list(stream.batches()), stream.domains
            calibration = data.calibration_batches()
            source = Adapter(model, Source())
            source.adapt(batches[0].images)  # not timed: first calls are slow
            started = time.process_time()
            reference = [source.adapt(batch.images).logits for batch in batches]
            seconds = time.process_time() - started
        adapter = Adapter(model, objects.method, calibration, guard=objects.guard, seed=given.seed)
        scores = Scores(domains, num_classes_of(model))
        started = time.process_time()
        answers = [adapter.adapt(batch.images).logits for batch in batches]
        ratio = (time.process_time() - started) / seconds
        for batch, logits, exact in zip(batches, answers, reference, strict=True):
            scores.add(logits, exact, batch.labels, batch.domains)
        found, counts = scores.summary(), adapter.counts
        state = sum(value.nbytes for value in adapter.state.values())
        print(
            f"{joined:20s} source {found['error_source_mean']:.4f} error {found['error_mean']:.4f} "
            f"class {found['error_class_mean']:.4f} worst {found['error_worst']:.3f} "
            f"loss {found['loss_worst']:+.3f} ({found['loss_worst_corruption']}) "
            f"ece {found['ece_source_mean']:.3f} -> {found['ece_mean']:.3f} "
            f"time x{ratio:.2f} of {counts.images / seconds:.0f}/s backward {counts.backward} "
            f"state {state} resets {counts.reset} rolled back {counts.rolled_back}",
            flush=True,
        )


if __name__ == "__main__":
    main()
