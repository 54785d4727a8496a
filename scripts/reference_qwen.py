"""Reference tensors of the flow models whose text encoder is Qwen3: Z-Image and FLUX.2 [klein].

For reference.py and reference_flow.py. Everything runs on the CPU in f32 and in eval mode; all
tensors are f32 (B images, T tokens of width D). The inputs are what diffusers' transformer.forward
takes, by its names. Of Z-Image:

    in.x                      [B, C, 1, H, W]  standard normal; the list that forward takes, stacked
    in.t                      [B]              0 to 1, that is, 1 - sigma; another for each row
    in.cap_feats              [B, T, D]        standard normal, zero behind each row's own length
    in.cap_mask               [B, T]           1 where a row has a token; its length differs by row
    out.prediction            [B, C, 1, H, W]  the list that forward returns, stacked, not negated

Of FLUX.2 (c latent channels, C = 4 c, S = h w with h = H/2, w = W/2):

    in.hidden_states          [B, S, C]  standard normal
    in.encoder_hidden_states  [B, T, D]  standard normal
    in.timestep               [B]        0 to 1, another for each row
    in.img_ids, in.txt_ids    [S, 4] and [T, 4]: (0, row, column, 0) and (0, 0, 0, token)
    in.guidance               [B]        another for each row; only with guidance_embeds
    out.prediction            [B, S, C]

Where there is a text encoder:

    in.input_ids              [B, T]     of a pipeline the prompts under its chat template, padded
                                         and truncated to max_sequence_length; else random
    in.attention_mask         [B, T]     1 where a row has a token; the padding is on the right
    out.prompt_embeds         [B, T, D]  Z-Image: the last hidden state but one; FLUX.2: those
                                         after 9, 18 and 27 layers side by side. The padding's
                                         rows count with FLUX.2; of a whole Z-Image they are 0,
                                         else they mean nothing

A whole pipeline, that is, a folder with a model_index.json, also gives:

    out.negative_prompt_embeds  [1, T, D]     of the empty prompt
    in.latents                  as below      standard normal; what the network's input holds too
    in.image                    [B, 3, y, x]  smooth noise in [-1, 1], as large as out.image
    out.latents                 as below      what the pipeline's own Euler steps end with
    out.image                   [B, 3, y, x]  the VAE's decoding of out.latents, not clamped
    out.encoded                 as below      the mean of the VAE's encoding of in.image

Latents are the sampler's state: of Z-Image [B, C, H, W], which is (mean - shift_factor) *
scaling_factor; of FLUX.2 [B, 4 c, h, w], 2 x 2 patches in channels (c, 2, 2), normalised by the
VAE's running mean and variance.

Guidance: Z-Image's pipeline adds g (cond - uncond) to cond at g > 0; FLUX.2 [klein]'s takes uncond
+ g (cond - uncond) at g > 1, unless model_index.json says is_distilled.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.24.0, safetensors 0.8.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from reference import PROMPTS, load_component, smooth_image, spread_timesteps
from transformers import AutoTokenizer, Qwen3ForCausalLM, Qwen3Model

# A lone component's tokens where no number is asked for: neither they nor half of them is a
# multiple of 32, to which Z-Image pads.
LONE_TOKENS = 77


def row_lengths(batch, tokens):
    """A number of tokens for each row, from all of them down."""
    return [max(tokens - i * tokens // batch, 1) for i in range(batch)]


def row_mask(lengths, tokens):
    """[B, T]: 1 in the first entries of each row."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).float()


class ZImage:
    """What diffusers does with Z-Image."""

    transformer, pipeline, vae = ZImageTransformer2DModel, ZImagePipeline, AutoencoderKL
    text_encoders = {"text_encoder": Qwen3Model}
    tokens, guidance, thinking = 512, 3.0, True
    inputs = ("x", "t", "cap_feats", "cap_mask")

    @staticmethod
    def channels(config):
        return config.in_channels

    @staticmethod
    def state(latents):
        """The sampler's state of a VAE's latents."""
        return latents

    @staticmethod
    def text_width(config):
        return config.cap_feat_dim

    @staticmethod
    def own_inputs(config, state, text, guidance):
        """The transformer's inputs at a state and random text; other rows have fewer tokens."""
        batch, tokens, _ = text.shape
        mask = row_mask(row_lengths(batch, tokens), tokens)
        return {
            "in.x": state.unsqueeze(2).clone(),  # safetensors wants no shared memory
            "in.t": (1000 - spread_timesteps(batch)) / 1000,
            "in.cap_feats": text * mask[..., None],
            "in.cap_mask": mask,
        }

    @staticmethod
    def predict(transformer, tensors):
        lengths = tensors["in.cap_mask"].sum(1).long()
        output = transformer(
            list(tensors["in.x"].unbind()),
            tensors["in.t"],
            [text[:length] for text, length in zip(tensors["in.cap_feats"], lengths)],
        )
        return torch.stack(output.sample)

    @staticmethod
    def embed(states):
        return states[-2]

    @staticmethod
    def encode_prompts(pipe, prompts, tokens):
        """The pipeline's embeddings [B, T, D], zero in the padding."""
        # the pipeline writes the chat template's text into the list that it is given
        embeds, _ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=tokens
        )
        rows = [torch.nn.functional.pad(row, (0, 0, 0, tokens - len(row))) for row in embeds]
        return torch.stack(rows)

    @staticmethod
    def unpack(latents, height, width):
        """The state [B, C, H, W] of what the pipeline's steps hold."""
        return latents

    @staticmethod
    def decode(vae, state):
        return vae.decode(state / vae.config.scaling_factor + vae.config.shift_factor).sample

    @staticmethod
    def encode(vae, image):
        mean = vae.encode(image).latent_dist.mean
        return (mean - vae.config.shift_factor) * vae.config.scaling_factor


class Flux2:
    """What diffusers does with FLUX.2 [klein]."""

    transformer, pipeline, vae = Flux2Transformer2DModel, Flux2KleinPipeline, AutoencoderKLFlux2
    text_encoders = {"text_encoder": Qwen3ForCausalLM}
    tokens, guidance, thinking = 512, 4.0, False
    inputs = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids")
    layers = (9, 18, 27)

    @staticmethod
    def channels(config):
        return config.in_channels // 4

    @staticmethod
    def state(latents):
        return Flux2KleinPipeline._patchify_latents(latents)

    @staticmethod
    def text_width(config):
        return config.joint_attention_dim

    @staticmethod
    def own_inputs(config, state, text, guidance):
        batch = len(state)
        inputs = {
            "in.hidden_states": Flux2KleinPipeline._pack_latents(state),
            "in.encoder_hidden_states": text,
            "in.timestep": spread_timesteps(batch) / 1000,
            "in.img_ids": Flux2KleinPipeline._prepare_latent_ids(state)[0],
            "in.txt_ids": Flux2KleinPipeline._prepare_text_ids(text)[0],
        }
        if config.guidance_embeds:
            inputs["in.guidance"] = guidance - 0.5 * torch.arange(batch)
        return inputs

    @staticmethod
    def predict(transformer, tensors):
        guidance = {"guidance": tensors["in.guidance"]} if "in.guidance" in tensors else {}
        inputs = {name: tensors[f"in.{name}"] for name in Flux2.inputs}
        return transformer(**inputs, **guidance).sample

    @staticmethod
    def embed(states):
        return torch.cat([states[layer] for layer in Flux2.layers], dim=-1)

    @staticmethod
    def encode_prompts(pipe, prompts, tokens):
        return pipe.encode_prompt(prompts, max_sequence_length=tokens)[0]

    @staticmethod
    def unpack(latents, height, width):
        return latents.transpose(1, 2).unflatten(2, (height, width))

    @staticmethod
    def statistics(vae):
        """The mean and the standard deviation of the packed latents, by channel."""
        mean, variance = vae.bn.running_mean, vae.bn.running_var
        return mean[:, None, None], (variance + vae.config.batch_norm_eps).sqrt()[:, None, None]

    @staticmethod
    def decode(vae, state):
        mean, deviation = Flux2.statistics(vae)
        return vae.decode(Flux2KleinPipeline._unpatchify_latents(state * deviation + mean)).sample

    @staticmethod
    def encode(vae, image):
        mean, deviation = Flux2.statistics(vae)
        return (Flux2.state(vae.encode(image).latent_dist.mean) - mean) / deviation


QWEN_FAMILIES = {family.transformer.__name__: family for family in (ZImage, Flux2)}


def load_text_encoder(family, folder):
    return load_component(family.text_encoders["text_encoder"], folder)


def load_qwen_pipeline(family, folder, transformer):
    """diffusers' pipeline of a folder around a transformer that is already loaded."""
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text())
    told = {"is_distilled": index.get("is_distilled", False)} if family is Flux2 else {}
    pipe = family.pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=load_component(family.vae, folder / "vae"),
        text_encoder=load_text_encoder(family, folder / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        transformer=transformer,
        **told,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenize_chat(tokenizer, prompts, tokens, thinking):
    """(ids, mask) of prompts in the words of a user, as both pipelines make them."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in prompts
    ]
    read = tokenizer(
        texts, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt"
    )
    return read.input_ids, read.attention_mask


def embed_tokens(family, text_encoder, ids, mask):
    """The embeddings [B, T, D] that a pipeline of the family makes of tokens."""
    output = text_encoder(
        input_ids=ids.long(), attention_mask=mask.long(), output_hidden_states=True
    )
    return family.embed(output.hidden_states)


def random_text(family, text_encoder, batch, tokens, generator):
    """The text encoder's own inputs and output, at random tokens."""
    config = text_encoder.config
    mask = row_mask(row_lengths(batch, tokens), tokens)
    ids = torch.randint(config.vocab_size, (batch, tokens), generator=generator)
    ids = torch.where(mask > 0, ids, config.pad_token_id or 0)
    embeds = embed_tokens(family, text_encoder, ids, mask)
    return {"in.input_ids": ids, "in.attention_mask": mask, "out.prompt_embeds": embeds}


def sample_qwen(family, pipe, state, prompts, steps, guidance, tokens):
    """(the state that the pipeline's steps end with, what the pipeline itself returns of it)."""
    seen = []

    def keep(pipe, step, timestep, given):
        seen.append(given["latents"])
        return {}

    per_cell = pipe.vae_scale_factor * (2 if family is Flux2 else 1)
    height, width = state.shape[-2:]
    returned = pipe(
        prompt=list(prompts),
        height=height * per_cell,
        width=width * per_cell,
        latents=state.clone(),
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=tokens,
        output_type="latent",
        callback_on_step_end=keep,
    ).images
    return family.unpack(seen[-1], height, width), returned


def whole_reference(family, pipe, state, prompts, steps, guidance, tokens, generator):
    """The tensors that only a whole pipeline has."""
    ids, mask = tokenize_chat(pipe.tokenizer, prompts, tokens, family.thinking)
    final, _ = sample_qwen(family, pipe, state, prompts, steps, guidance, tokens)
    decoded = family.decode(pipe.vae, final)
    image = smooth_image(len(state), *decoded.shape[-2:], generator)
    return {
        "in.latents": state,
        "in.input_ids": ids,
        "in.attention_mask": mask,
        "in.image": image,
        "out.prompt_embeds": family.encode_prompts(pipe, prompts, tokens),
        "out.negative_prompt_embeds": family.encode_prompts(pipe, [""], tokens),
        "out.latents": final,
        "out.image": decoded,
        "out.encoded": family.encode(pipe.vae, image),
    }


def make_qwen_reference(
    family,
    transformer,
    folder,
    seed=0,
    batch=2,
    steps=8,
    guidance=None,
    height=None,
    width=None,
    prompts=None,
    max_sequence_length=None,
):
    """(tensors, record): what the reference's files hold; without a pipeline there is no record."""
    folder, config = Path(folder), transformer.config
    whole = (folder / "model_index.json").is_file()
    prompts = [(prompts or PROMPTS)[i % len(prompts or PROMPTS)] for i in range(batch)]
    guidance = family.guidance if guidance is None else guidance
    tokens = max_sequence_length or (family.tokens if whole else LONE_TOKENS)
    height, width = height or (16 if whole else 8), width or (16 if whole else 8)
    if height % 2 or width % 2:
        raise ValueError(f"{height} x {width} latents: both have to be even")

    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, family.channels(config), height, width, generator=generator)
    state = family.state(latents)
    text = torch.randn(batch, tokens, family.text_width(config), generator=generator)
    tensors = family.own_inputs(config, state, text, guidance)
    tensors["out.prediction"] = family.predict(transformer, tensors)
    if not whole:
        if (folder / "text_encoder").is_dir():
            text_encoder = load_text_encoder(family, folder / "text_encoder")
            tensors |= random_text(family, text_encoder, batch, tokens, generator)
        return tensors, None
    pipe = load_qwen_pipeline(family, folder, transformer)
    tensors |= whole_reference(family, pipe, state, prompts, steps, guidance, tokens, generator)
    record = {
        "prompts": prompts,
        "steps": steps,
        "guidance": guidance,
        "max_sequence_length": tokens,
        "eta": 0.0,
    }
    return tensors, record


@torch.no_grad()
def make_text_reference(folder, seed=0, batch=2, max_sequence_length=None, **unused):
    """(tensors, None) of a lone text encoder; the transformer beside it says what is taken of it.

    Options of pictures and prompts are accepted and change nothing.
    """
    folder = Path(folder)
    beside = folder.resolve().parent / "transformer" / "config.json"
    name = json.loads(beside.read_text()).get("_class_name") if beside.is_file() else None
    if name not in QWEN_FAMILIES:
        raise ValueError(
            f"{folder} holds a Qwen3 text encoder, and {beside} is not that of "
            f"{' or '.join(QWEN_FAMILIES)}: which hidden states count is not known"
        )
    family = QWEN_FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    text_encoder = load_text_encoder(family, folder)
    tokens = max_sequence_length or LONE_TOKENS
    return random_text(family, text_encoder, batch, tokens, generator), None
