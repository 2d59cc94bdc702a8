import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torchvision.models.detection import _utils as reference
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork
from transformers import pipeline

from hf_dl.models import DetectionImageProcessor, TwoStageDetectorConfig, TwoStageDetectorForObjectDetection
from hf_dl.models import detection_proposals as P
from hf_dl.models import two_stage_detector as T
from hf_dl.models.detection_boxes import IGNORED, NEGATIVE, encode_boxes, to_centers
from hf_dl.models.detection_output import NO_CLASS, PADDING_LOGIT
from tests.models.contract import SAME_CODE, ModelContract
from tests.models.test_detection_boxes import random_boxes

TINY = {
    "feature_size": 8, "num_labels": 3, "backbone": "conv_classifier", "backbone_options": {"widths": [4, 4, 8]},
    "anchor_sizes": [8, 16], "anchor_ratios": [1], "num_candidates": 24, "num_proposals": 12, "region_sample": 8,
    "roi_size": 2, "hidden_size": 32,
}  # fmt: skip


def detector(**fields):
    torch.manual_seed(0)
    return TwoStageDetectorForObjectDetection(TwoStageDetectorConfig(**(TINY | fields)))


def grid(batch):
    """Return nine square proposals per image and one row of padding."""
    center = torch.tensor([0.25, 0.5, 0.75])
    boxes = torch.cat([torch.cartesian_prod(center, center), torch.full((9, 2), 0.4)], 1)
    return torch.cat([boxes, torch.zeros(1, 4)]).expand(batch, -1, -1).contiguous()


def label(*rows):
    rows = torch.tensor(rows, dtype=torch.float).reshape(-1, 5)
    return {"class_labels": rows[:, 0].long(), "boxes": rows[:, 1:]}


# torchvision's function for tracing non-maximum suppression uses an old name
@pytest.mark.filterwarnings("ignore:`create_unbacked_symint` is deprecated:FutureWarning")
class TestFaster(ModelContract):
    model_class = TwoStageDetectorForObjectDetection
    processor_class = DetectionImageProcessor
    auto_classes = ("AutoModelForObjectDetection",)
    overfit_steps = 150
    overfit_learning_rate = 1e-2
    overfit_ratio = 0.4
    dynamo = {"capture_dynamic_output_shape_ops": True}  # of non-maximum suppression

    def config(self):
        return TwoStageDetectorConfig(**TINY)

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        classes = torch.randint(-1, 3, (batch, 2, 1), generator=draw)
        boxes = torch.rand(batch, 2, 4, generator=draw) * 0.4 + 0.3
        pixels = torch.randn(batch, 3, 32, 32, generator=draw)
        return {"pixel_values": pixels, "labels": torch.cat([classes, boxes], -1)}

    def smooth_answer(self, model, inputs):
        """Return outputs of both stages for fixed proposals: the choice of proposals is not continuous."""
        pixels = inputs["pixel_values"]
        found = [model(pixels, proposals=grid(pixels.shape[0])).logits[:, :9].flatten()]
        return torch.cat(
            found + ([] if model.rpn is None else [model.rpn.score_anchors(model.backbone(pixels))[0].flatten()])
        )


class TestFast(TestFaster):
    skipped = SAME_CODE
    test_overfits_eight_examples = test_compiles_to_the_same_numbers = None

    def config(self):
        return TwoStageDetectorConfig(**TINY, two_stage_type="fast", roi_type="pool")

    def inputs(self, batch):
        return super().inputs(batch) | {"proposals": grid(batch)}


# ---------------------------------------------------------------------------------------------------------------------
# Equal to torchvision


def reference_network():
    generator = AnchorGenerator(sizes=((16, 28),), aspect_ratios=((0.7, 1.4),))
    return RegionProposalNetwork(
        generator, torch.nn.Identity(), 0.7, 0.3, 10_000, 0.5,
        {"training": 30, "testing": 30}, {"training": 28, "testing": 28}, 0.7,
    )  # fmt: skip


def predictions(seed=0):
    draw = torch.Generator().manual_seed(seed)
    anchors = random_boxes(35, seed).repeat(2, 1)
    objectness = torch.randn(2, 70, dtype=torch.float64, generator=draw)
    return objectness, torch.randn(2, 70, 4, dtype=torch.float64, generator=draw) * 0.3, anchors


def test_anchors_of_the_network_equal_torchvision_up_to_half_a_cell():
    theirs = AnchorGenerator(sizes=((16, 28, 48),), aspect_ratios=((0.7, 1.0, 1.4),))
    theirs.cell_anchors = [theirs.generate_anchors((16, 28, 48), (0.7, 1.0, 1.4))]
    expected = theirs.grid_anchors([[4, 6]], [[torch.tensor(8), torch.tensor(8)]])[0]
    config = TwoStageDetectorConfig(feature_size=8)
    objectness, codes, ours = P.RegionProposalNetwork(config).score_anchors(torch.zeros(1, 8, 4, 6))
    assert objectness.shape == (1, 216) and codes.shape == (1, 216, 4)
    # torchvision sorts by ratio, then by size, rounds the anchors, and centers them at the corners of the cells
    expected = expected.unflatten(0, (24, 3, 3)).transpose(1, 2).flatten(0, 2)
    assert torch.equal((ours - 4).round(), expected)


def test_the_losses_of_proposals_equal_torchvision():
    objectness, codes, anchors = predictions()
    targets = [random_boxes(6, 8), random_boxes(3, 9)]
    network = reference_network()
    labels, matched = network.assign_targets_to_anchors([anchors, anchors], [{"boxes": boxes} for boxes in targets])
    wanted = network.box_coder.encode(matched, [anchors, anchors])
    expected = network.compute_loss(
        objectness.flatten()[:, None], codes.flatten(0, 1), [row.double() for row in labels], wanted
    )
    places = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True)
    classes = torch.tensor([[0] * 6, [0] * 3 + [NO_CLASS] * 3])
    found = P.proposal_losses(objectness, codes, anchors, classes, places, random=False)
    assert list(found) == ["rpn_objectness", "rpn_box"]
    torch.testing.assert_close(tuple(found.values()), expected)
    assert min(expected) > 0.05


def test_proposals_equal_torchvision():
    objectness, codes, anchors = predictions(3)
    codes = codes / 10  # the two copies of each anchor overlap
    network = reference_network().eval()
    boxes = network.box_coder.decode(codes.flatten(0, 1), [anchors, anchors]).reshape(2, 70, 4)
    boxes_of, scores_of = network.filter_proposals(boxes, objectness, [(40, 50)] * 2, [70])
    found, filled = P.select_proposals(objectness, codes, anchors, height=40, width=50, candidates=30, count=28)
    assert found.shape == (2, 28, 4)
    for image in range(2):
        torch.testing.assert_close(found[image][filled[image]], boxes_of[image])
    assert not filled.all()  # fewer boxes than rows remain
    assert filled.int().diff(dim=1).max() <= 0  # padding comes last


def test_the_losses_of_regions_equal_torchvision():
    draw = torch.Generator().manual_seed(0)
    regions = random_boxes(40).reshape(2, 20, 4)
    objects, classes = random_boxes(6, 5).reshape(2, 3, 4), torch.randint(0, 4, (2, 3), generator=draw)
    matches = torch.randint(-1, 3, (2, 20), generator=draw)
    logits = torch.randn(2, 20, 5, dtype=torch.float64, generator=draw)
    codes = torch.randn(2, 20, 4, 4, dtype=torch.float64, generator=draw)
    labels = torch.where(matches < 0, 0, classes.gather(1, matches.clamp(min=0)) + 1)
    coder = reference.BoxCoder((10.0, 10.0, 5.0, 5.0))
    target = objects.gather(1, matches.clamp(min=0)[..., None].expand(-1, -1, 4))
    wanted = coder.encode_single(target.flatten(0, 1), regions.flatten(0, 1))
    # torchvision predicts codes for the background, too, which it does not train
    all_codes = torch.cat([torch.zeros(40, 4, dtype=torch.float64), codes.flatten(0, 1).flatten(1)], 1)
    expected = fastrcnn_loss(logits.flatten(0, 1), all_codes, [labels.flatten()], [wanted])
    found = T.region_losses(logits, codes, regions, classes, objects, matches)
    assert list(found) == ["classification", "box"]
    torch.testing.assert_close(tuple(found.values()), expected)
    # regions that are ignored do not count
    padded = [torch.cat([values, values[:, :4]], 1) for values in (logits, codes, regions)]
    more = torch.cat([matches, torch.full((2, 4), IGNORED)], 1)
    torch.testing.assert_close(T.region_losses(*padded, classes, objects, more), found)


def test_regions_are_matched_as_in_torchvision():
    boxes, objects = random_boxes(50)[None], random_boxes(5, 1)[None]
    classes = torch.zeros(1, 5, dtype=torch.int64)
    regions, matches = T.sample_regions(
        boxes, torch.ones(1, 50, dtype=torch.bool), classes, objects, count=1000, random=False
    )
    matcher = reference.Matcher(0.5, 0.5, allow_low_quality_matches=False)
    everything = torch.cat([boxes, objects], 1)
    expected = matcher(P.pairwise_iou(objects[0], everything[0]))
    assert regions.shape == (1, 55, 4) and (expected >= 0).sum() > 5
    torch.testing.assert_close(regions, everything)
    assert torch.equal(matches[0], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Samples, padding and outputs


def test_a_new_detector_proposes_its_anchors_and_is_undecided():
    """transformers skips modules without own parameters, so each layer must be initialized by itself."""
    model = detector(feature_size=64)
    layers = [(model.rpn.hidden, 0.01), (model.rpn.objectness, 0.01), (model.rpn.codes, 0.01)]
    for layer, std in [*layers, (model.head.classes, 0.01), (model.head.codes, 0.001)]:
        assert layer.weight.std().item() == pytest.approx(std, rel=0.3) and not layer.bias.any()
    output = model(torch.randn(2, 3, 32, 32), labels=[label([1, 0.5, 0.5, 0.4, 0.4])] * 2)
    assert output.loss_dict["rpn_objectness"].item() == pytest.approx(math.log(2), abs=0.02)
    assert output.loss_dict["classification"].item() == pytest.approx(math.log(4), abs=0.05)
    found, codes, anchors = model.rpn.score_anchors(model.backbone(torch.randn(2, 3, 32, 32)))
    moved = P.decode_boxes(codes, anchors.expand_as(codes))
    assert (moved - anchors).abs().max() < 1  # pixels


def test_a_sample_holds_a_quarter_of_objects_and_ignores_padding():
    objects = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 3])
    classes = torch.tensor([[2, 1, NO_CLASS], [NO_CLASS] * 3])
    near = torch.tensor([0.0, 0, 10, 11]).expand(20, 4)
    boxes = torch.cat([near, torch.tensor([50.0, 50, 60, 60]).expand(20, 4)]).expand(2, -1, -1)
    filled = (torch.arange(40) < 35).expand(2, -1)
    regions, matches = T.sample_regions(boxes, filled, classes, objects, count=16, random=True)
    assert regions.shape == (2, 16, 4) and (matches[0] >= 0).sum() == 4 and (matches == NEGATIVE).sum() == 28
    repeated = [T.sample_regions(boxes, filled, classes, objects, count=16, random=False)[0] for _ in range(2)]
    assert torch.equal(*repeated)
    none, matches = T.sample_regions(boxes, filled & False, classes[1:].expand(2, -1), objects, count=16, random=True)
    assert none.shape == (2, 16, 4) and (matches == IGNORED).all()


def test_negatives_in_ignored_regions_are_ignored():
    places = torch.tensor([[0.0, 0, 10, 10], [20, 0, 40, 20], [0, 0, 0, 0]])
    boxes = torch.tensor([[0.0, 0, 10, 9], [22, 2, 30, 10], [10, 0, 22, 4], [60, 0, 70, 10], [20, 0, 40, 20]])
    found = P.match_labels(boxes, torch.tensor([1, NO_CLASS, NO_CLASS]), places, lambda iou: P.match_anchors(iou))
    assert found.tolist() == [0, IGNORED, NEGATIVE, NEGATIVE, IGNORED]


def test_scores_are_probabilities_and_padding_has_none():
    draw = torch.Generator().manual_seed(0)
    logits, codes = torch.randn(1, 6, 4, generator=draw) * 3, torch.randn(1, 6, 3, 4, generator=draw)
    regions = random_boxes(6).float()[None]
    filled = torch.arange(6)[None] < 4
    odds, boxes = T.decode_regions(logits, codes, regions, filled, 40, 50)
    torch.testing.assert_close(odds.sigmoid()[:, :4], logits.softmax(-1)[:, :4, 1:])
    assert (odds[:, 4:] == PADDING_LOGIT).all()
    coder, best = reference.BoxCoder((10.0, 10.0, 5.0, 5.0)), int(logits[0, 0, 1:].argmax())
    expected = coder.decode_single(codes[0, :1, best], regions[0, :1]).clamp(min=0)
    expected = to_centers(expected.minimum(torch.tensor([50.0, 40, 50, 40]))) / torch.tensor([50.0, 40, 50, 40])
    torch.testing.assert_close(boxes[0, :1], expected)
    # also for a class that is certain in single precision
    sure, _ = T.decode_regions(torch.tensor([[[0.0, 200, 0, 0]]]), codes[:, :1], regions[:, :1], filled[:, :1], 40, 50)
    assert sure.isfinite().all() and sure[0, 0].sigmoid().tolist() == [1, 0, 0]


@pytest.mark.parametrize("fields", [{}, {"two_stage_type": "fast", "roi_type": "pool"}])
def test_images_without_objects_or_proposals_train(fields):
    model, images = detector(**fields).train(), torch.randn(2, 3, 32, 48)
    one, many = label((1, 0.5, 0.5, 0.2, 0.2)), torch.rand(10_000, 4) * 0.5 + 0.1
    many = {"class_labels": torch.zeros(10_000, dtype=torch.int64), "boxes": many}
    for labels in ([label(), label()], [label(), one], [one, many]):
        for proposals in (grid(2), torch.zeros(2, 5, 4)):
            model.zero_grad()
            output = model(images, labels=labels, proposals=proposals)
            output.loss.backward()
            assert output.loss.isfinite() and output.logits.shape[:2] == output.pred_boxes.shape[:2]
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert list(output.loss_dict)[-2:] == ["classification", "box"]
    assert model(images, labels=[label(), label()], proposals=grid(2)).loss_dict["box"] == 0


def test_small_objects_have_an_anchor():
    model = detector().train()
    terms = model(torch.zeros(1, 3, 32, 32), labels=[label((0, 0.03, 0.03, 0.06, 0.06))]).loss_dict
    assert terms["rpn_box"] > 0


def test_boxes_are_inside_the_image_and_proposals_of_the_user_are_used():
    model = detector().eval()
    with torch.no_grad():
        for parameter in [*model.rpn.parameters(), *model.head.parameters()]:
            parameter.add_(torch.randn_like(parameter))
        boxes = model(torch.randn(2, 3, 32, 64)).pred_boxes
        own = model(torch.randn(2, 3, 32, 64), proposals=grid(2))
    low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    assert low.min() > -1e-6 and high.max() < 1 + 1e-6 and boxes[..., 2:].min() >= 0
    assert own.logits.shape == (2, 10, 3) and (own.logits[:, 9] == PADDING_LOGIT).all()
    assert own.logits[:, :9].min() > PADDING_LOGIT


def test_wrong_inputs_are_refused():
    fast, images = detector(two_stage_type="fast"), torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="two_stage_type='fast' needs proposals, and got none"):
        fast(images)
    with pytest.raises(ValueError, match=r"proposals has shape \(1, 10, 4\), expected \(2, n, 4\)"):
        fast(images, proposals=grid(1))
    with pytest.raises(ValueError, match="Got 2 images and labels of 1"):
        detector()(images, labels=[label()])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"two_stage_type": "fastest"}, "two_stage_type"),
        ({"roi_type": "crop"}, "roi_type='crop' is unknown. Choose one of: align, pool"),
        ({"anchor_sizes": [0]}, r"anchor_sizes=\[0\] is invalid. Expected positive numbers"),
        ({"num_proposals": 0}, "num_proposals=0 must be at least 1"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        TwoStageDetectorConfig(**fields)


@pytest.mark.parametrize("kind", ["faster", "fast"])
def test_the_pipeline_of_transformers_gives_boxes_in_pixels(kind, tmp_path):
    model = detector(two_stage_type=kind, num_labels=2, id2label={0: "cat", 1: "dog"}).eval()
    with torch.no_grad():
        model.head.classes.bias.copy_(torch.tensor([-9.0, 0, 9]))
    model.save_pretrained(tmp_path)
    count = 9 if kind == "fast" else 0  # of selective search
    DetectionImageProcessor(size={"height": 32, "width": 32}, num_proposals=count).save_pretrained(tmp_path)
    found = pipeline("object-detection", str(tmp_path))(
        [Image.new("RGB", (200, 100)), Image.new("L", (30, 60))], batch_size=2
    )
    assert all(row and {box["label"] for box in row} == {"dog"} for row in found)
    assert max(box["box"]["xmax"] for box in found[0]) > 100 > 60 >= max(box["box"]["ymax"] for box in found[1])


def test_another_number_of_classes_can_be_fine_tuned(tmp_path):
    detector(num_labels=1).save_pretrained(tmp_path)
    model = TwoStageDetectorForObjectDetection.from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 12, 2)


def test_encoding_by_hand():
    """A box that is twice as wide as its proposal has the code 5 log 2 for its width."""
    found = encode_boxes(torch.tensor([0.0, 0, 20, 10]), torch.tensor([5.0, 0, 15, 10]), weights=T.CODE_WEIGHTS)
    torch.testing.assert_close(found, torch.tensor([0, 0, 3.4657, 0]), atol=1e-4, rtol=0)
