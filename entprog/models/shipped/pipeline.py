"""A fine-tuned human-video network as a pipeline of diffusers: who, from a picture, moves as pose frames say.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    clip = pipe(reference=picture, pose=frames).frames[0]

This file lies beside the weights and stands alone: it needs torch and diffusers, not the program that trained them.
Pose frames are what `draw` of skeleton.py, in the same folder, makes of body points.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors.torch import load_file

PROMPT, POOLED = "prompt_embeds", "pooled_prompt_embeds"
FRAMES_AT_ONCE = 8
"""Frames that an image VAE encodes or decodes at a time."""
REFERENCE_SEED = 4764156602392020899
"""Of the noise that the reference of Wan-Animate and VACE is trained with."""
FIRST_FRAME = "first frame"
"""Form of the conditions of a network that sees the reference as the clip's first frame (Wan's image-to-video)."""
LAST_FRAME = "first and last frame"
"""Of one that sees its last frame too."""
CONTROL = "control"
"""Of one that sees the pose as control video, and the reference as a first frame with zeros after it (Fun-Control)."""
FIRST_LATENT = "first latent frame"
"""Of one that sees the reference like that, and poses as further channels (CogVideoX's image-to-video)."""
GIVEN_FRAME = "given frame"
"""Of one where the first latent frame itself is the reference, at timestep 0 (Wan's TI2V)."""
FIRST_FRAMES = (FIRST_FRAME, LAST_FRAME)
GREY = 128
"""Level of a picture that is not there."""
LAST = "last image"
FACES = "tokens and faces"
"""Of a network of Wan-Animate that sees tokens of the reference, and faces."""
EMBEDDED = "embedded reference"
"""Of a network of SVD that sees CLIP's embedding of the reference, whose latents have a little noise."""
REFERENCE_NOISE = 0.02
"""Deviation of that noise, of pixels in -1..1."""
ENCODED_SIDE = 224
"""Height and width of what SVD's image encoder sees."""
BELONGS = {"image": "reference", "face": "pose"}
"""What is there exactly where a condition is: image tokens of the reference, faces beside the pose."""
NOTHING = {"face": -1.0}
"""What stands for a condition that is withheld, where that is not 0."""
OWN_INPUTS = ("wan_animate", "wan_vace")
"""Families whose networks have inputs of their own for reference and pose."""
VACE_MASK = 64
"""Channels of VACE's mask: pixels that a latent stands for."""
TEXT_PARTS = ("tokenizer", "text_encoder")
MORE_TEXT_PARTS = {"HunyuanVideoPipeline": ("tokenizer_2", "text_encoder_2")}
"""Further ones of the pipelines that encode texts by two encoders."""
IMAGE_VAES = (diffusers.AutoencoderKL, diffusers.AutoencoderKLTemporalDecoder)


@dataclass
class ClipOutput(BaseOutput):
    """Clips, one for each that was asked for; of `output_type="latent"` their latents [1, C, F', H', W']."""

    frames: list | np.ndarray | torch.Tensor


class ReferencePosePipeline(DiffusionPipeline):
    """Noise to a clip, with reference and pose as further input channels of the network."""

    folder = None
    """Where it was loaded from, on this machine; None: from a hub."""
    model_cpu_offload_seq = "image_encoder->transformer->transformer_2->unet->vae"
    _optional_components = [  # noqa: RUF012 - diffusers reads a list
        "transformer", "transformer_2", "unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2",
        "image_encoder", "image_processor", "feature_extractor",
    ]  # fmt: skip

    def __init__(
        self,
        scheduler,
        transformer=None,
        unet=None,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        image_encoder=None,
        image_processor=None,
        feature_extractor=None,
        transformer_2=None,
        text_encoder_2=None,
        tokenizer_2=None,
        family="",
        conditions=(),
        form="",
        latent_channels=3,
        compression=(1, 1),
        text_shape=(1, 1, 1),
        encodes=None,
        prompt=False,
        clip=None,
        elsewhere=None,
        experts=None,
        boundary_ratio=None,
        expand_timesteps=False,
        empty_text=False,
        withheld_as_without=False,
    ):
        """form: how the network sees its conditions, if not as further channels alike. compression: clip frames to a
        latent frame, and pixels to a latent row. text_shape: of what cross-attention sees. encodes: the pipeline of
        diffusers that encodes texts for this network, and their tokens. prompt: whether the values of what
        cross-attention sees lie in prompt_embeds.safetensors; otherwise they are zeros. clip: frames, height, width
        and fps of the clips it was trained on. elsewhere: where parts lie that are not in this folder. experts: of two
        networks the conditions that each sees, by part; transformer is in charge from boundary_ratio · 1000 up.
        expand_timesteps: whether tokens of the network can have timesteps of their own, as the base's pipeline says.
        empty_text: whether the text in prompt_embeds.safetensors is the empty one, which it was shown for none; without
        it zeros are. withheld_as_without: whether VACE's networks were shown a withheld pose as grey, and no frame for
        a withheld reference; otherwise both as zeros."""
        super().__init__()
        vae = vae or fetched("vae", elsewhere)
        if experts:
            transformer = transformer or fetched("transformer", elsewhere)
            transformer_2 = transformer_2 or fetched("transformer_2", elsewhere)
        if takes_tokens(form, transformer):
            image_encoder = image_encoder or fetched("image_encoder", elsewhere)
            image_processor = image_processor or fetched("image_processor", elsewhere)
        if form == EMBEDDED:
            image_encoder = image_encoder or fetched("image_encoder", elsewhere)
            feature_extractor = feature_extractor or fetched("feature_extractor", elsewhere)
        self.register_modules(
            scheduler=scheduler, transformer=transformer, unet=unet, vae=vae, text_encoder=text_encoder,
            tokenizer=tokenizer, image_encoder=image_encoder, image_processor=image_processor,
            feature_extractor=feature_extractor, transformer_2=transformer_2, text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )  # fmt: skip
        self.register_to_config(
            family=family, conditions=list(conditions), form=form, latent_channels=latent_channels,
            compression=list(compression), text_shape=list(text_shape), encodes=encodes, prompt=prompt, clip=clip,
            elsewhere=elsewhere, experts=experts, boundary_ratio=boundary_ratio, expand_timesteps=expand_timesteps,
            empty_text=empty_text, withheld_as_without=withheld_as_without,
        )  # fmt: skip

    def register_to_config(self, **values):
        """diffusers says last of all where the pipeline was loaded from."""
        super().register_to_config(**values)
        here = values.get("_name_or_path")
        if here and Path(here).is_dir():
            self.folder = Path(here).resolve()  # whatever the working directory is later

    @property
    def network(self):
        return self.transformer if self.unet is None else self.unet

    def expert(self, timestep):
        """The network that predicts at a timestep, and the conditions that it sees in the order of its channels."""
        if not self.config.experts:
            return self.network, self.config.conditions
        part = "transformer" if timestep >= self.config.boundary_ratio * 1000 else "transformer_2"
        return getattr(self, part), self.config.experts[part]

    @torch.no_grad()
    def __call__(
        self,
        reference=None,
        pose=None,
        num_frames=None,
        height=None,
        width=None,
        num_inference_steps=20,
        reference_guidance=1.0,
        pose_guidance=1.0,
        prompt=None,
        prompt_embeds=None,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
        last=None,
        face=None,
        pooled_prompt_embeds=None,
        background=None,
        mask=None,
        text_guidance=1.0,
    ):
        """One clip.

        reference: PIL picture, or uint8 [H, W, 3], or float [3, H, W] in -1..1, of the clip's size; of VACE also a list
        of such. pose: as many drawn frames: PIL pictures, uint8 [F, H, W, 3], or float [F, 3, H, W] in -1..1. Guidance
        1 is none, more strengthens a condition over a zeroed one, the text over none. prompt: a text, instead of the
        folder's own, or prompt_embeds [1, tokens, width] of one, of HunyuanVideo with pooled_prompt_embeds [1, width],
        and zeros for tokens that its mask leaves out.
        last: the last frame, as the reference, of networks that were trained with it. face: as many pictures of a face,
        as pose has them, for networks of Wan-Animate that were trained with them; without any none is seen.
        background, mask: as many frames of a video that the person is put into, and of where: pictures in black and
        white, or bool [F, H, W], of networks of Wan-Animate and VACE.
        latents: the noise to begin with, [1, C, F', H', W']. output_type: pil, np, pt or latent.
        """
        if last is not None and self.config.form != LAST_FRAME:
            raise ValueError("this network was trained without the last frame of clips: leave last out")
        device, shown = self._execution_device, {}
        reference, *references = reference if isinstance(reference, list | tuple) else [reference]
        vace = self.config.family == "wan_vace"
        if references and not vace:
            raise ValueError("several references are of networks of VACE alone: give one")
        given = {"reference": reference, "pose": pose}
        for name in self.config.conditions:
            if given[name] is None:
                raise ValueError(f"this network was trained with {', '.join(self.config.conditions)}: give {name}")
            shown[name] = pixels(given[name]).to(device)
        frames, rows, columns = self.clip_shape(shown, num_frames, height, width)
        temporal, spatial = self.config.compression
        size = (1, self.config.latent_channels, 1 + (frames - 1) // temporal, rows // spatial, columns // spatial)
        picture = shown.get("reference")
        ends = [picture]
        if self.config.form == LAST_FRAME:
            if last is None:
                raise ValueError("this network was trained with the last frame of each clip: give last")
            ends.append(fitting("last", pixels(last), rows, columns).to(device))
        if self.config.form == EMBEDDED:
            shown["reference"] = picture + REFERENCE_NOISE * own_noise(picture)
        if self.config.form in FIRST_FRAMES:
            first, *others = ends[:frames]
            between = picture.new_zeros(1, 3, frames - 1 - len(others), rows, columns)
            shown["reference"] = torch.cat([first, between, *others], dim=2)
        if background is not None or mask is not None:
            if not (vace or self.config.form == FACES) or background is None or mask is None:
                raise ValueError("background and mask belong together, and to networks of Wan-Animate and VACE")
            background = fitting("background", pixels(background), rows, columns, frames).to(device)
            person = fitting("mask", where(mask)[None, None], rows, columns, frames)[0, 0].to(device)
            if vace:
                shown["pose"] = shown["pose"] * person
        shown = {name: self.encode(video) for name, video in shown.items()}
        if references:
            others = [fitting("each reference", pixels(other), rows, columns) for other in references]
            more = [self.encode(other.to(device)) for other in others]
            shown["reference"] = torch.cat([shown["reference"], *more], dim=1)
        if face is not None:
            if self.config.form != FACES:
                raise ValueError("this network was trained without faces: leave face out")
            side = self.transformer.motion_encoder.size
            faces = torch.nn.functional.interpolate(pixels(face)[0].transpose(0, 1), (side, side), mode="bilinear")
            shown["face"] = faces.transpose(0, 1)[None].to(device)
        if background is not None:
            shown["background"] = (self.vace_around if vace else self.around)(background, person)
        if takes_tokens(self.config.form, self.transformer):
            shown["image"] = torch.cat([self.tokens(end) for end in ends], dim=1)
        if self.config.form == EMBEDDED:
            shown["image"] = self.embedding(picture)
        if self.config.form in FIRST_FRAMES:
            shown["reference"] = self.masked(shown["reference"])
        elif self.config.form in (CONTROL, FIRST_LATENT):
            if self.config.form == FIRST_LATENT and self.vae.config.invert_scale_latents:  # as it was trained
                shown["reference"] = shown["reference"] / self.vae.config.scaling_factor**2
            after = shown["reference"].new_zeros(1).expand(1, size[1], size[2] - 1, *size[3:])
            shown["reference"] = torch.cat([shown["reference"], after], dim=2)
        elif self.config.form == GIVEN_FRAME:
            mask = torch.ones_like(shown["reference"][:, :1])
            first = torch.cat([mask, shown["reference"]], dim=1)
            after = first.new_zeros(1).expand(*first.shape[:2], size[2] - 1, *size[3:])
            shown["reference"] = torch.cat([first, after], dim=2)
        elif "reference" in shown:
            shown["reference"] = shown["reference"].expand(-1, -1, size[2], -1, -1)
            if self.config.family == "svd" and self.vae is not None:  # in the VAE's own scale, as SVD was trained
                shown["reference"] = shown["reference"] / self.vae.config.scaling_factor
        text = self.text(prompt_embeds, pooled_prompt_embeds) if prompt is None else self.encoded(prompt)
        text = {name: tensor.to(device) for name, tensor in text.items()}
        of_two = (
            "image" in shown and self.config.family == "wan" and self.transformer.config.pos_embed_seq_len is not None
        )
        if of_two and self.config.form == FIRST_FRAME:  # the last frame is unknown
            text[LAST] = self.tokens(torch.full_like(picture, GREY / 127.5 - 1))
        none = {} if text_guidance == 1 else self.no_text(text)
        passes = guidance(self.config.conditions, reference_guidance, pose_guidance, text_guidance)
        if latents is None:
            latents = randn_tensor(size, generator=generator, device=device)
        if type(self.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
            evenly = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
            self.scheduler.set_timesteps(sigmas=evenly, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(self.scheduler, "set_begin_index"):  # timesteps in whole numbers may begin with equal ones
            self.scheduler.set_begin_index(0)
        latents = latents.to(device).float() * getattr(self.scheduler, "init_noise_sigma", 1)  # known only now
        takes = inspect.signature(self.scheduler.step).parameters  # some add noise on the way
        extra = {"generator": generator} if "generator" in takes else {}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            seen = latents
            if hasattr(self.scheduler, "scale_model_input"):
                seen = self.scheduler.scale_model_input(latents, timestep)
            prediction = torch.zeros_like(latents)
            for kept, share in passes.items():
                visible = {
                    name: v if BELONGS.get(name, name) in (*kept, "background") else v * 0 + NOTHING.get(name, 0)
                    for name, v in shown.items()
                }
                said = text if "text" in kept else text | none
                prediction += share * self.predict(seen, timestep.reshape(1).to(device), visible, said)
            if self.config.form == GIVEN_FRAME:  # from its noise straight to what is given
                straight = (seen - shown["reference"][:, 1:]) / (timestep / 1000).clamp(min=1e-4)
                prediction = instead(prediction, shown["reference"][:, :1], straight)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
        if self.config.form == GIVEN_FRAME:
            latents = instead(latents, shown["reference"][:, :1], shown["reference"][:, 1:])
        made = latents if output_type == "latent" else shaped(self.decode(latents), output_type)
        return ClipOutput(frames=made) if return_dict else (made,)

    def clip_shape(self, shown, frames, height, width):
        """Frames, rows and columns of the clip, as what is shown has them, or as they are given."""
        known = self.config.clip or {}
        trained = " ({width}x{height} in training)".format(**known) if known else ""
        sizes = {name: tuple(video.shape[-2:]) for name, video in shown.items()}
        if len(set(sizes.values())) > 1:
            (high, wide), (rows, columns) = sizes["reference"], sizes["pose"]
            raise ValueError(
                f"reference is {wide}x{high}, pose frames {columns}x{rows}: give both of the clip's size{trained}"
            )
        rows, columns = next(iter(sizes.values()), (height or known.get("height"), width or known.get("width")))
        if (height or rows, width or columns) != (rows, columns):
            raise ValueError(f"height and width say {width or columns}x{height or rows}, the pictures {columns}x{rows}")
        drawn = shown["pose"].shape[2] if "pose" in shown else None
        if drawn and frames and frames != drawn:
            raise ValueError(f"num_frames is {frames}, pose frames are {drawn}: leave num_frames out")
        frames = frames or drawn or known.get("frames")
        if not (frames and rows and columns):
            raise ValueError("the clip's shape is not known: give num_frames, height and width")
        temporal, spatial = self.config.compression
        if (frames - 1) % temporal or rows % spatial or columns % spatial:
            raise ValueError(
                f"a clip of {frames} frames of {columns}x{rows}: its frames must be 1 more than a multiple of "
                f"{temporal}, its sides multiples of {spatial}{trained}"
            )
        return frames, rows, columns

    def predict(self, latents, timestep, shown, text):
        """The network's prediction, float32 like the latents."""
        network, conditions = self.expert(timestep)
        free = 1
        if self.config.form == GIVEN_FRAME:
            mask, first = shown["reference"][:, :1], shown["reference"][:, 1:]
            free, conditions = 1 - mask, [name for name in conditions if name != "reference"]
            latents = instead(latents, mask, first)
            frames, rows, columns = network.config.patch_size
            timestep = timestep[:, None] * free[:, 0, ::frames, ::rows, ::columns].flatten(1)
        inputs = [latents, *(shown[name] for name in conditions)]
        if self.config.family not in OWN_INPUTS:
            unused = network.config.in_channels - sum(each.shape[1] for each in inputs)
            if unused:  # the base's own image, which it was trained here without
                inputs.insert(1, latents.new_zeros(1, unused, *latents.shape[2:]))
        dtype, family = network.dtype, self.config.family
        text = text | {name: shown[name] for name in (*BELONGS, "background") if name in shown}
        inputs, text = [each.to(dtype) for each in inputs], {name: value.to(dtype) for name, value in text.items()}
        text[FIRST_LATENT] = self.config.form == FIRST_LATENT
        if family == "wan_animate":
            more = [text.get(name) for name in ("image", "face", "background")]
            return self.wan_animate(*inputs, timestep, text[PROMPT], *more).float()
        if family == "wan_vace":
            noisy, *reference, pose = inputs
            return self.wan_vace(network, noisy, pose, timestep, text, *reference).float()
        call = {
            "wan": wan, "cogvideox": cogvideox, "latte": latte, "svd": svd, "motion_unet": motion_unet,
            "hunyuan_video": hunyuan_video,
        }  # fmt: skip
        out = call[family](network, torch.cat(inputs, dim=1), timestep, text[PROMPT], text)
        return free * out[:, : latents.shape[1]].float()  # Latte may have channels for a learned variance after them

    def around(self, video, person):
        """What is given of a video [1, 3, F, H, W] whose person, bool [F, H, W], is replaced: a mask of what is kept,
        four frames to a latent one, of which the first counts four times, and latents."""
        spatial = self.config.compression[1]
        kept = (~person[:, ::spatial, ::spatial]).float()
        kept = torch.cat([kept[:1].expand(3, -1, -1), kept]).unflatten(0, (-1, 4)).transpose(0, 1)
        return torch.cat([kept[None], self.encode(video)], dim=1)

    def wan_animate(self, noisy, reference, pose, timestep, text, image=None, face=None, background=None):
        """The reference is a frame of its own before the clip's, noised along with it; a face that is not there is -1
        everywhere."""
        network, reference = self.network, reference[:, :, :1]
        latents = torch.cat([led(reference, timestep).to(noisy), noisy], dim=2)
        if background is None:
            background = torch.cat([noisy.new_zeros(1, 4, *noisy.shape[2:]), self.nothing(noisy)], dim=1)
        first = torch.cat([torch.ones_like(reference[:, :1]).repeat(1, 4, 1, 1, 1), reference], dim=1)
        given = torch.cat([first, background], dim=2)
        side = network.motion_encoder.size
        if face is None:
            face = noisy.new_full((1, 3, 4 * (noisy.shape[2] - 1) + 1, side, side), -1.0)
        (velocity,) = network(
            hidden_states=torch.cat([latents, given], dim=1),
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_hidden_states_image=no_image(network.config).to(noisy) if image is None else image,
            pose_hidden_states=pose,
            face_pixel_values=face,
            return_dict=False,
        )
        return velocity[:, :, 1:]

    def vace_around(self, video, person):
        """What is kept of a video [1, 3, F, H, W] whose person, bool [F, H, W], is replaced, in latents, and where the
        pose is followed instead."""
        side = int(VACE_MASK**0.5)
        kept = self.encode(video * ~person)
        mask = person.float().unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(2, 4, 0, 1, 3).flatten(0, 1)
        mask = torch.nn.functional.interpolate(mask[None], size=kept.shape[2:], mode="nearest-exact")
        return torch.cat([kept, mask], dim=1)

    def wan_vace(self, network, noisy, pose, timestep, more, reference=None):
        """The control is the pose, followed all over or where the mask beside a background is white; references are
        frames before the clip's, the first one next to it."""
        latents, around, channels = noisy, more.get("background"), noisy.shape[1]
        if self.config.withheld_as_without:
            pose = pose if pose.any() else self.nothing(pose).to(pose)
            reference = reference if reference is not None and reference.any() else None
        if around is None:
            around = torch.cat([self.nothing(noisy), vace_mask(pose, 1)], dim=1)
        control = torch.cat([around[:, :channels], pose, around[:, channels:]], dim=1)
        if reference is not None:
            reference = reference[:, :, 0].unflatten(1, (-1, channels)).flip(1).transpose(1, 2).contiguous()
            latents = torch.cat([led(reference, timestep).to(noisy), noisy], dim=2)
            first = torch.cat([reference, torch.zeros_like(reference), vace_mask(reference, 0)], dim=1)
            control = torch.cat([first, control], dim=2)
        (velocity,) = network(
            hidden_states=latents, timestep=timestep, encoder_hidden_states=more[PROMPT], control_hidden_states=control,
            return_dict=False,
        )  # fmt: skip
        return velocity[:, :, -noisy.shape[2] :]

    def masked(self, latents):
        """Latents of a clip whose first frame is given, with the mask that says so before them."""
        network, conditions = self.expert(1000)
        channels = network.config.in_channels - (1 + len(conditions)) * latents.shape[1]
        mask = torch.zeros_like(latents[:, :1]).repeat(1, channels, 1, 1, 1)
        mask[:, :, 0] = 1
        if self.config.form == LAST_FRAME:
            mask[:, -1, -1] = 1
        return torch.cat([mask, latents], dim=1)

    def tokens(self, picture):
        """What the base's image encoder says of a picture [1, 3, 1, H, W] in -1..1: [1, tokens, width]."""
        if self.image_encoder is None or self.image_processor is None:
            raise ValueError(
                "this network sees tokens of the reference, and image_encoder or image_processor is not there: give "
                "DiffusionPipeline.from_pretrained those of its base, image-to-video Wan"
            )
        seen = ((picture[0, :, 0] + 1) * 127.5).round().byte().movedim(0, -1).cpu().numpy()
        inputs = self.image_processor(images=[seen], return_tensors="pt")["pixel_values"]
        inputs = inputs.to(picture.device, self.image_encoder.dtype)
        return self.image_encoder(inputs, output_hidden_states=True).hidden_states[-2].float()

    def embedding(self, picture):
        """What SVD's image encoder says of a picture [1, 3, 1, H, W] in -1..1: [1, 1, width]."""
        if self.image_encoder is None or self.feature_extractor is None:
            raise ValueError(
                "this network sees an embedding of the reference, and image_encoder or feature_extractor is not there: "
                "give DiffusionPipeline.from_pretrained those of its base, Stable Video Diffusion"
            )
        small = (antialiased(picture[:, :, 0], ENCODED_SIDE) + 1) / 2
        once = {"do_center_crop": False, "do_resize": False, "do_rescale": False, "do_normalize": True}
        inputs = self.feature_extractor(images=small.cpu(), **once, return_tensors="pt")["pixel_values"]
        inputs = inputs.to(picture.device, self.image_encoder.dtype)
        return self.image_encoder(inputs).image_embeds.unsqueeze(1).float()

    def nothing(self, like):
        """Latents of a grey clip, where a pipeline has frames of a video that is not there."""
        if self.vae is None:
            return torch.zeros_like(like)
        temporal, spatial = self.config.compression
        frames, rows, columns = 1 + (like.shape[2] - 1) * temporal, like.shape[3] * spatial, like.shape[4] * spatial
        return self.encode(torch.zeros(1, 3, frames, rows, columns, device=like.device)).to(like)

    def encoded(self, prompt):
        """A text as the base's own pipeline encodes it, by name: [1, tokens, width], perhaps more."""
        if self.config.encodes is None:
            raise ValueError(f"networks of family {self.config.family} are shown no prompt here: give prompt_embeds")
        name, tokens = self.config.encodes
        wanted = (*TEXT_PARTS, *MORE_TEXT_PARTS.get(name, ()))
        parts = {part: getattr(self, part) or fetched(part, self.config.elsewhere) for part in wanted}
        if None in parts.values():
            raise ValueError(
                f"{' and '.join(wanted)} are not all there: give DiffusionPipeline.from_pretrained those of the base, "
                "or give prompt_embeds"
            )
        kind, device = getattr(diffusers, name), self._execution_device
        for part, here in parts.items():
            if part.startswith("text_encoder") and getattr(self, part) is None:  # fetched for this call
                here.to(device)
        parameters = inspect.signature(kind).parameters.values()
        pipe = kind(**{one.name: None for one in parameters if one.default is one.empty} | parts)
        if name == "AnimateDiffPipeline":
            return {PROMPT: pipe.encode_prompt(prompt, device, 1, False)[0]}
        if name == "LattePipeline":
            return {PROMPT: filled_up(pipe.encode_prompt(prompt, False, device=device)[0], tokens)}
        if name == "HunyuanVideoPipeline":
            embeds, pooled, mask = pipe.encode_prompt(prompt, device=device)
            return {PROMPT: embeds * mask.unsqueeze(-1).to(embeds), POOLED: pooled}
        without = {"do_classifier_free_guidance": False, "max_sequence_length": tokens, "device": device}
        return {PROMPT: pipe.encode_prompt(prompt, **without)[0]}

    def text(self, given, pooled):
        """What the network sees of a text, by name: [1, tokens, width] for cross-attention, perhaps more."""
        if given is not None and self.config.form == EMBEDDED:
            raise ValueError(
                "this network sees an embedding of the reference in place of a text: give no prompt_embeds"
            )
        if (given is not None and self.config.family == "hunyuan_video") != (pooled is not None):
            raise ValueError(
                "networks of family hunyuan_video, and no others, need both prompt_embeds and pooled_prompt_embeds"
            )
        if given is not None:
            return {PROMPT: given} | ({} if pooled is None else {POOLED: pooled})
        if not self.config.prompt:
            return {PROMPT: torch.zeros(self.config.text_shape)}
        name = f"{PROMPT}.safetensors"
        if self.folder is None:
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(self.config._name_or_path, name)
        else:
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{name} is not in {self.folder}: give prompt_embeds")
        return {name: tensor[None] for name, tensor in load_file(path).items()}

    def no_text(self, shown):
        """What the network was shown for a text that was withheld, by name, where another one is shown."""
        if self.config.form == EMBEDDED:
            raise ValueError(
                "this network sees an embedding of the reference in place of a text: give no text_guidance"
            )
        none = {name: torch.zeros_like(value) for name, value in shown.items() if name != LAST}
        none = self.text(None, None) if self.config.empty_text else none | {PROMPT: torch.zeros(self.config.text_shape)}
        none = {name: tensor.to(shown[name]) for name, tensor in none.items()}
        if torch.equal(none[PROMPT], shown[PROMPT]):
            raise ValueError("text_guidance compares a text with none, and none is shown: give prompt")
        return none

    def encode(self, video):
        """Pixels [1, 3, F, H, W] in -1..1 → scaled latents: the posterior's mode."""
        vae = self.vae
        if vae is None:
            return video
        video = video.to(vae.dtype)
        if isinstance(vae, diffusers.AutoencoderKLWan):
            mean, std = scale(vae, video)
            return ((vae.encode(video).latent_dist.mode() - mean) / std).float()
        if isinstance(vae, IMAGE_VAES):
            parts = video[0].transpose(0, 1).split(FRAMES_AT_ONCE)
            latents = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])
            latents = (latents - shift(vae)) * vae.config.scaling_factor
            return latents.transpose(0, 1)[None].float()
        return (vae.encode(video).latent_dist.mode() * vae.config.scaling_factor).float()

    def decode(self, latents):
        """Latents [1, C, F', H', W'] → pixels [1, 3, F, H, W] in -1..1."""
        vae = self.vae
        if vae is None:
            return latents.clamp(-1, 1)
        latents = latents.to(vae.dtype)
        if isinstance(vae, diffusers.AutoencoderKLWan):
            mean, std = scale(vae, latents)
            video = vae.decode(latents * std + mean).sample
        elif isinstance(vae, IMAGE_VAES):
            frames = (latents[0] / vae.config.scaling_factor).transpose(0, 1)
            if isinstance(vae, diffusers.AutoencoderKLTemporalDecoder):
                frames = vae.decode(frames, num_frames=len(frames)).sample
            else:
                frames = torch.cat([vae.decode(part + shift(vae)).sample for part in frames.split(FRAMES_AT_ONCE)])
            video = frames.transpose(0, 1)[None]
        else:
            video = vae.decode(latents / vae.config.scaling_factor).sample
        return video.float().clamp(-1, 1)


# ---- each family's call: network, inputs [1, channels, F', H', W'], timestep [1], text, more of it → prediction ----


def wan(network, inputs, timestep, text, more):
    image = more.get("image", no_image(network.config))
    if LAST in more:
        image = torch.cat([image, more[LAST]])
    elif image is not None and network.config.pos_embed_seq_len is not None and len(image) == 1:
        image = image.unflatten(1, (2, -1)).flatten(0, 1)  # of the first and the last frame
    return network(
        hidden_states=inputs, timestep=timestep, encoder_hidden_states=text,
        encoder_hidden_states_image=None if image is None else image.to(inputs), return_dict=False,
    )[0]  # fmt: skip


def takes_tokens(form, network):
    """Whether a network sees image tokens of the reference."""
    return (
        form in (*FIRST_FRAMES, CONTROL, FACES) and network is not None and network.config.added_kv_proj_dim is not None
    )


def fetched(name, elsewhere):
    """A part that is not in the folder, from where it lies; None if nothing says where."""
    place = (elsewhere or {}).get(name)
    if not place:
        return None
    library = diffusers
    if name not in ("vae", "transformer", "transformer_2"):
        import transformers as library
    return getattr(library, place["kind"]).from_pretrained(
        place["name"], revision=place["revision"], subfolder=place["subfolder"]
    )


def no_image(sizes):
    """Image tokens of a Wan image-to-video network, as if no image was given; None where it takes none."""
    if sizes.added_kv_proj_dim is None:
        return None
    if sizes.pos_embed_seq_len is None:
        return torch.zeros(1, 1, sizes.image_dim)
    return torch.zeros(2, sizes.pos_embed_seq_len // 2, sizes.image_dim)


def hunyuan_video(network, inputs, timestep, text, more):
    sizes = network.config
    pooled = more.get(POOLED, inputs.new_zeros(1, sizes.pooled_projection_dim))
    used = text.any(2)  # not the zeros that fill it up; text that is all zeros is seen as it is
    used = used | ~used.any(1, keepdim=True)
    return network(
        hidden_states=inputs, timestep=timestep, encoder_hidden_states=text, pooled_projections=pooled,
        encoder_attention_mask=used.to(text.dtype),
        guidance=inputs.new_full((1,), 6000.0) if sizes.guidance_embeds else None,  # its pipeline's strength
        return_dict=False,
    )[0]  # fmt: skip


def cogvideox(network, inputs, timestep, text, more):
    sizes = network.config
    extra = -inputs.shape[2] % (sizes.patch_size_t or 1)  # 1.5 takes frames in pairs
    inputs = torch.cat([inputs[:, :, :1].expand(-1, -1, extra, -1, -1), inputs], dim=2)
    if extra and more[FIRST_LATENT]:  # the image stays the first frame's alone
        inputs[:, sizes.out_channels : 2 * sizes.out_channels, 1:] = 0
    (v,) = network(
        hidden_states=inputs.transpose(1, 2), encoder_hidden_states=text, timestep=timestep,
        ofs=None if sizes.ofs_embed_dim is None else inputs.new_full((1,), 2.0),
        image_rotary_emb=rotary(sizes, *inputs.shape[2:], inputs.device), return_dict=False,
    )  # fmt: skip
    return v.transpose(1, 2)[:, :, extra:]


def rotary(sizes, frames, rows, columns, device):
    """CogVideoX's rotary positions; None for a network without."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    if not sizes.use_rotary_positional_embeddings:
        return None
    patch = sizes.patch_size
    grid, base = (rows // patch, columns // patch), (sizes.sample_height // patch, sizes.sample_width // patch)
    common = {"embed_dim": sizes.attention_head_dim, "grid_size": grid, "device": device}
    if sizes.patch_size_t is None:
        crops = get_resize_crop_region_for_grid(grid, base[1], base[0])
        return get_3d_rotary_pos_embed(crops_coords=crops, temporal_size=frames, **common)
    frames = -(-frames // sizes.patch_size_t)
    return get_3d_rotary_pos_embed(crops_coords=None, temporal_size=frames, grid_type="slice", max_size=base, **common)


def filled_up(text, tokens):
    """Embeddings [1, some, width] and zeros after them, up to a number of tokens."""
    return torch.nn.functional.pad(text, (0, 0, 0, tokens - text.shape[1]))


def latte(network, inputs, timestep, text, more):
    used = text.any(2).any(0).nonzero()
    text = text[:, : int(used.max()) + 1] if len(used) else text  # without what it is filled up with
    every = network.temp_pos_embed
    network.temp_pos_embed = every[:, : inputs.shape[2]]  # a shorter clip has the positions of the first frames
    try:
        return network(hidden_states=inputs, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
    finally:
        network.temp_pos_embed = every


def svd(network, inputs, timestep, text, more):
    noise = REFERENCE_NOISE if "image" in more else 0.0
    clip = inputs.new_tensor([[6, 127, noise]])  # frames per second - 1, motion, noise on the reference
    return network(
        sample=inputs.transpose(1, 2), timestep=timestep, encoder_hidden_states=more.get("image", text),
        added_time_ids=clip,
        return_dict=False,
    )[0].transpose(1, 2)  # fmt: skip


def motion_unet(network, inputs, timestep, text, more):
    text = text.expand(inputs.shape[2], -1, -1)
    return network(sample=inputs, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]


# ---- pictures and numbers ----


def fitting(name, video, rows, columns, frames=1):
    """A picture or frames [..., F, H, W], which must be of the clip's size."""
    if tuple(video.shape[-3:]) != (frames, rows, columns):
        there, high, wide = video.shape[-3:]
        raise ValueError(f"{name} has {there} pictures of {wide}x{high}, needed are {frames} of {columns}x{rows}")
    return video


def vace_mask(latents, value):
    return latents.new_full((1, VACE_MASK, *latents.shape[2:]), value)


def pixels(given):
    """A picture or frames → float [1, 3, F, H, W] in -1..1."""
    if isinstance(given, list | tuple):
        given = np.stack([np.asarray(opaque(frame, "white").convert("RGB")) for frame in given])
    elif isinstance(given, Image.Image):
        given = np.array(opaque(given, "white").convert("RGB"))  # a picture's own cannot be written to
    video = torch.as_tensor(given)
    if video.dtype == torch.uint8:
        video = video.movedim(-1, -3).float() / 127.5 - 1
    if video.ndim == 3:
        video = video[None]
    return video.transpose(0, 1)[None].float()


def antialiased(pictures, side):
    """Pictures [B, 3, H, W] as squares of a side: blurred by as much as they shrink, then bicubic."""
    functional = torch.nn.functional
    for axis in (2, 3):
        sigma = max((pictures.shape[axis] / side - 1) / 2, 0.001)
        taps = int(max(4 * sigma, 3)) | 1
        places = torch.arange(taps, device=pictures.device, dtype=pictures.dtype) - taps // 2
        weights = torch.softmax(-((places / sigma) ** 2) / 2, dim=0)
        high, wide = (taps, 1) if axis == 2 else (1, taps)
        padded = functional.pad(pictures, (wide // 2, wide // 2, high // 2, high // 2), mode="reflect")
        pictures = functional.conv2d(padded, weights.view(1, 1, high, wide).expand(3, -1, -1, -1), groups=3)
    return functional.interpolate(pictures, (side, side), mode="bicubic", align_corners=True)


def own_noise(picture):
    """The noise that a picture [1, 3, 1, H, W] in -1..1 was trained with: a function of its levels' sum."""
    seed = int(((picture + 1) * 127.5).round().long().sum())
    drawn = torch.empty(picture.shape[1:]).normal_(generator=torch.Generator().manual_seed(seed))
    return drawn[None].to(picture)


def opaque(picture, background):
    """A picture over a colour where it is transparent, as training and `generate` take it."""
    if not picture.has_transparency_data:
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, background), picture.convert("RGBA"))


def where(mask):
    """Pictures in black and white, or bool [F, H, W] → bool [F, H, W], True where they are white."""
    if isinstance(mask, list | tuple):
        return torch.from_numpy(np.stack([np.asarray(opaque(frame, "black").convert("L")) for frame in mask])) >= 128
    return torch.as_tensor(mask).bool()


def shaped(video, output_type):
    """Pixels [1, 3, F, H, W] in -1..1 as a person wants them, a clip a row."""
    frames = ((video + 1) / 2).transpose(1, 2).cpu()
    if output_type == "pt":
        return frames
    frames = frames.movedim(2, -1).numpy()
    if output_type == "np":
        return frames
    return [[Image.fromarray(frame) for frame in (clip * 255).round().astype(np.uint8)] for clip in frames]


def guidance(conditions, reference, pose, text):
    """{what is shown, others being zeroed and a text being none: what that prediction counts}: InstructPix2Pix (arXiv
    2211.09800) for reference and pose, and for the text what diffusers' pipelines do."""
    strengths, shares, kept, left = {"reference": reference, "pose": pose}, {}, ("text",), 1.0
    for name in sorted(conditions, key=lambda name: name != "reference"):
        shares[kept] = left - strengths[name]
        kept, left = (*kept, name), strengths[name]
    shares[kept] = left + (text - 1)
    shares[kept[1:]] = 1 - text
    return {names: share for names, share in shares.items() if share}


def instead(values, mask, others):
    """Others where a mask is 1, values where it is 0."""
    return torch.where(mask.bool(), others, values)


def led(reference, timestep):
    """The reference's frame before the clip's, noised as the clip is."""
    t = timestep / 1000
    return (1 - t) * reference + t * fixed_noise(reference)


def fixed_noise(frame):
    """The one noise that a reference before the clip was trained with, [1, C, 1, H', W']."""
    generator = torch.Generator().manual_seed(REFERENCE_SEED)  # of the CPU: a GPU's draws others
    return torch.empty(frame.shape, dtype=torch.float32).normal_(generator=generator).to(frame.device)


def scale(vae, like):
    """Mean and deviation of the channels of Wan's latents, [1, C, 1, 1, 1]."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    return (torch.tensor(v, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1) for v in values)


def shift(vae):
    return getattr(vae.config, "shift_factor", None) or 0.0
