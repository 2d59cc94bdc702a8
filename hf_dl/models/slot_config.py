"""Configuration of the slot autoencoder, and named sizes of it."""

from collections.abc import Callable

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .layers_attention import GRADIENTS
from .slot_decoders import DECODERS
from .slot_encoders import ENCODERS
from .slot_frames import FRAME_DIM, SEEDS
from .slot_inits import SLOT_INITS


@strict
class SlotAutoencoderConfig(PreTrainedConfig):
    """Configuration of a `SlotAutoencoderModel`. The defaults give a small model that a CPU trains in minutes.

    Args:
        image_size: Height and width of the images in pixels. The decoder says which multiples it needs.
        num_channels: Number of image channels.
        encoder_type: A key of `ENCODERS`. "cnn" is a stack of 5x5 convolutions; "resnet18" is ResNet-18 with group
            normalization and stride 4.
        encoder_channels: Output channels of each convolution of the "cnn" encoder.
        encoder_strides: Stride of each convolution of the "cnn" encoder. The 128x128 model of the paper has four
            convolutions of stride 1.
        token_dim: Channels of the tokens after the position embedding and the MLP.
        num_slots: K, the default number of slots.
        slot_dim: Channels of a slot, including the three channels of its frame.
        frames: Whether each slot has a frame, its position and size (Biza et al. 2023), see `slot_frames`. Without
            frames, slot attention is as in Locatello et al. 2020.
        seeds: A key of `SEEDS`: where the frames start. "color" chooses places that differ from the main color of the
            image; "random" chooses any place, as Biza et al. 2023.
        num_iterations: T, the default number of iterations of slot attention.
        num_draws: Number of random slot initializations that evaluation tries per image; the time grows in
            proportion. Training uses one, and so does `slot_init="learned"`.
        slot_mlp_dim: Hidden units of the MLP inside slot attention.
        slot_init: A key of `SLOT_INITS`. "gaussian" draws from one learned Gaussian, and any number of slots works at
            inference. "learned" has one vector per slot, and `num_slots` is the maximum.
        slot_std: Initial standard deviation of the Gaussian of `slot_init="gaussian"`. The paper uses 1. The GRU must
            overwrite the draws within T iterations, and it learns to do so sooner when they are small.
        gradient: A key of `GRADIENTS`: "full", "implicit" or "bilevel" (see `SlotAttention`). With "implicit", the
            parameters of the initial slots keep their initial values.
        epsilon: Added to the attention before it is normalized over the tokens.
        qkv_bias: Whether the projections of slot attention have a bias.
        decoder_type: A key of `DECODERS`. "canvas" paints each slot in its own frame. "broadcast" uses transposed
            convolutions of stride 2 from `decoder_size` to `image_size`, then convolutions of stride 1.
            "pixel_shuffle" uses coarse grids and sub-pixel upsampling.
        decoder_channels: Hidden channels of the decoder: one entry per layer for "broadcast"; for the others, one
            entry per grid, each grid twice as fine as the previous one.
        decoder_size: Height and width of the grid that the slots are broadcast to.
        canvas_size: Height and width of the canvas of each slot, for `decoder_type="canvas"`.
        decoder_frequencies: Octaves of Fourier features in the decoder's position embedding; 0 as in the paper.
        pixel_std: Standard deviation of a pixel around the color that its slot paints, in the units of
            `pixel_values`. `SlotAutoencoderModel.posterior` uses it to weigh colors against alphas.
        prune_error: Evaluation removes a small slot if the mean squared error then increases by at most this fraction
            of the variance of the pixels. See `find_needed_slots` and `draw_cost`.

    Example:
        ```python
        >>> SlotAutoencoderConfig(num_slots=7, image_size=128).num_slots
        7

        ```
    """

    model_type = "slot_autoencoder"

    # Images
    image_size: int = 64
    num_channels: int = 3
    # Encoder
    encoder_type: str = "cnn"
    encoder_channels: list[int] | tuple[int, ...] = (32, 32)
    encoder_strides: list[int] | tuple[int, ...] = (2, 2)
    token_dim: int = 64
    # Slot attention
    num_slots: int = 5
    slot_dim: int = 64
    frames: bool = True
    seeds: str = "color"
    num_iterations: int = 5
    num_draws: int = 8
    slot_mlp_dim: int = 128
    slot_init: str = "gaussian"
    slot_std: float = 0.3
    gradient: str = "implicit"
    epsilon: float = 1e-8
    qkv_bias: bool = False
    # Decoder
    decoder_type: str = "canvas"
    decoder_channels: list[int] | tuple[int, ...] = (64, 32)
    decoder_size: int = 8
    canvas_size: int = 32
    decoder_frequencies: int = 4
    # Segmentation
    pixel_std: float = 0.2
    prune_error: float = 0.0125

    def __post_init__(self, **kwargs):
        """Convert tuples to lists as JSON does, so that a saved and loaded config equals the original."""
        # The names of these fields in older checkpoints; transformers expects a config under "decoder".
        self.encoder_type = kwargs.pop("encoder", self.encoder_type)
        self.decoder_type = kwargs.pop("decoder", self.decoder_type)
        self.encoder_channels = list(self.encoder_channels)
        self.encoder_strides = list(self.encoder_strides)
        self.decoder_channels = list(self.decoder_channels)
        super().__post_init__(**kwargs)
        # Slots have no names. transformers' image-segmentation pipeline labels the mask of a slot with these.
        self.id2label = {index: f"slot {index + 1}" for index in range(self.num_slots)}
        self.label2id = {label: index for index, label in self.id2label.items()}

    @property
    def frame_dim(self) -> int:
        """Channels of the frame in a slot: 3, or 0 without frames."""
        return FRAME_DIM if self.frames else 0

    @property
    def appearance_dim(self) -> int:
        """Channels of a slot without its frame."""
        return self.slot_dim - self.frame_dim

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is out of range or unknown, or if fields do not fit together.
        """
        for name, known in (
            ("encoder_type", ENCODERS),
            ("slot_init", SLOT_INITS),
            ("seeds", SEEDS),
            ("gradient", GRADIENTS),
            ("decoder_type", DECODERS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")
        for name in (
            "image_size",
            "num_channels",
            "token_dim",
            "num_slots",
            "slot_dim",
            "num_iterations",
            "num_draws",
            "slot_mlp_dim",
            "decoder_size",
            "canvas_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.appearance_dim < 1:
            raise ValueError(f"slot_dim={self.slot_dim} must be above {FRAME_DIM}, the channels of a frame.")
        if len(self.encoder_channels) != len(self.encoder_strides) or not self.encoder_channels:
            raise ValueError(
                f"encoder_channels={self.encoder_channels} and encoder_strides={self.encoder_strides} must have "
                "one entry for each convolution, at least one."
            )
        for name in ("slot_std", "pixel_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if not self.prune_error >= 0:
            raise ValueError(f"prune_error={self.prune_error} must be 0 or above.")
        if not self.decoder_channels:
            raise ValueError("decoder_channels=[] must have at least one entry.")
        DECODERS[self.decoder_type].check_config(self)


def _architecture(**fields) -> Callable[..., SlotAutoencoderConfig]:
    return lambda **others: SlotAutoencoderConfig(**{**fields, **others})


ARCHITECTURES: dict[str, Callable[..., SlotAutoencoderConfig]] = {
    # The defaults of the config, for 64x64 images on a CPU.
    "small": SlotAutoencoderConfig,
    # The small model with one part replaced, to measure what the part does.
    "random_seeds": _architecture(seeds="random"),
    "without_canvas": _architecture(decoder_type="pixel_shuffle"),
    "without_frames": _architecture(frames=False, decoder_type="pixel_shuffle"),
    # For 128x128 images on a GPU.
    "large": _architecture(
        image_size=128,
        encoder_type="resnet18",
        token_dim=192,
        num_slots=11,
        slot_dim=192,
        slot_mlp_dim=384,
        decoder_channels=[128, 64],
        canvas_size=64,
    ),
    # Locatello et al. 2020, appendix E, for 128x128 images.
    "paper": _architecture(
        image_size=128,
        encoder_channels=[64] * 4,
        encoder_strides=[1] * 4,
        num_slots=7,
        num_iterations=3,
        num_draws=1,
        slot_init="gaussian",
        slot_std=1.0,
        frames=False,
        gradient="full",
        decoder_frequencies=0,
        decoder_type="broadcast",
        decoder_size=8,
        decoder_channels=[64] * 5,
    ),
    # The slot attention baseline of SlotDiffusion on CLEVRTex, for 128x128 images.
    "resnet18": _architecture(
        image_size=128,
        encoder_type="resnet18",
        token_dim=192,
        num_slots=11,
        num_iterations=3,
        slot_dim=192,
        slot_mlp_dim=384,
        slot_init="learned",
        frames=False,
        gradient="full",
        decoder_frequencies=0,
        decoder_type="broadcast",
        decoder_size=8,
        decoder_channels=[128] * 4,
    ),
}
"""Configurations by name: `ARCHITECTURES["paper"](num_slots=11)` is a config."""
