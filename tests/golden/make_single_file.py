"""Makes single/: how the golden folders would be one file in the layout of their authors.

    python tests/golden/make_single_file.py

single/NAME.json says of each tensor of such a file of NAME the part of the folder and the tensors
that lie in it one below the other, and where it is not just these: whether their halves are
swapped, whether it is transposed, and its shape. The test puts the file together from the folder
and opens it.

Every part of every such file goes through diffusers' own conversion here, which has to give the
folder's tensors back to the bit.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.23.0, safetensors 0.8.
"""

import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

GOLDEN = Path(__file__).resolve().parent

import torch
from diffusers.loaders import single_file_utils as sfu
from safetensors.torch import load_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}


def load_part(folder):
    """A component's tensors, of all its files."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    tensors.pop("text_model.embeddings.position_ids", None)
    return tensors


def module_of(name):
    return re.fullmatch(r"(.*)\.(weight|bias)", name).groups()


def unet_name(name, layers):
    """The authors' name of a UNet's tensor, with `layers` resnets a level."""
    module, kind = module_of(name)
    if module in UNET:
        return f"{UNET[module]}.{kind}"
    way, level, part, j, rest = re.fullmatch(
        r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)",
        module,
    ).groups()
    level, j = int(level or 0), int(j)
    if part == "resnets":
        rest = RESNET[rest]
    if way == "mid":
        at = "middle_block.1" if part == "attentions" else f"middle_block.{2 * j}"
    elif way == "down":
        block = level * (layers + 1) + 1
        at = f"input_blocks.{block + (layers if part == 'downsamplers' else j)}."
        at += "1" if part == "attentions" else "0"
        rest = "op" if part == "downsamplers" else rest
    else:
        block = level * (layers + 1) + (layers if part == "upsamplers" else j)
        at = f"output_blocks.{block}." + {"resnets": "0", "attentions": "1"}.get(part, "UP")
    return f"{at}.{rest}.{kind}"


def unet_file(tensors, config):
    """The file's tensors, each with what it is made of."""
    names = {name: unet_name(name, config["layers_per_block"]) for name in tensors}
    attends = {
        new.rsplit(".norm.", 1)[0] for new in names.values() if new.endswith(".1.norm.weight")
    }
    made = {}
    for name, new in names.items():
        if ".UP." in new:
            block = new.split(".UP.")[0]
            new = new.replace(".UP.", ".2." if f"{block}.1" in attends else ".1.")
        made[new] = {"of": [name]}
    return made


def vae_file(tensors, levels):
    made = {}
    for name, tensor in tensors.items():
        new = name
        for old in [("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out")]:
            new = new.replace(f"attentions.0.{old[0]}.", f"attentions.0.{old[1]}.")
        if found := re.match(r"decoder\.up_blocks\.(\d+)\.", new):
            new = new.replace(found[0], f"decoder.up.{levels - 1 - int(found[1])}.")
        for ours, theirs in [
            ("encoder.down_blocks.", "encoder.down."),
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
            ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
            ("mid_block.attentions.0.", "mid.attn_1."),
            (".resnets.", ".block."),
            ("conv_shortcut.", "nin_shortcut."),
            ("downsamplers.0.conv.", "downsample.conv."),
            ("upsamplers.0.conv.", "upsample.conv."),
            ("conv_norm_out.", "norm_out."),
        ]:
            new = new.replace(ours, theirs)
        made[new] = {"of": [name]}
        if ".attn_1." in new and tensor.ndim == 2:
            made[new]["shape"] = [*tensor.shape, 1, 1]
    return made


def clip_file(tensors):
    """As transformers has it."""
    bare = "embeddings.token_embedding.weight" in tensors
    prefix = "text_model." if bare else ""
    return {
        (name if name.startswith("text_projection") else prefix + name): {"of": [name]}
        for name in tensors
    }


def open_clip_file(tensors, extra_layer):
    """As open_clip has it; `extra_layer`: with the last one, that Stable Diffusion 2 lacks."""
    names = {name.removeprefix("text_model."): name for name in tensors}
    layers = 1 + max(int(n.split(".")[2]) for n in names if n.startswith("encoder.layers."))
    made = {
        "token_embedding.weight": {"of": [names["embeddings.token_embedding.weight"]]},
        "positional_embedding": {"of": [names["embeddings.position_embedding.weight"]]},
        "ln_final.weight": {"of": [names["final_layer_norm.weight"]]},
        "ln_final.bias": {"of": [names["final_layer_norm.bias"]]},
    }
    if "text_projection.weight" in names:
        made["text_projection"] = {"of": ["text_projection.weight"], "transpose": True}
    for i in range(layers + extra_layer):
        ours = f"encoder.layers.{min(i, layers - 1)}"
        theirs = f"transformer.resblocks.{i}"
        for kind in ["weight", "bias"]:
            made[f"{theirs}.attn.in_proj_{kind}"] = {
                "of": [names[f"{ours}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            }
            for part, own in [
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ]:
                made[f"{theirs}.{part}.{kind}"] = {"of": [names[f"{ours}.{own}.{kind}"]]}
    return made


def outside(name, table):
    """The authors' name of a tensor outside the blocks."""
    for ours, theirs in table.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    return name


def sd3_file(tensors, config):
    made, last = {}, config["num_layers"] - 1
    for name in tensors:
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)\.(weight|bias)", name)
        if not found:
            made[outside(name, SD3)] = {"of": [name], "swap": name.startswith("norm_out")}
            continue
        i, part, kind = found.groups()
        stream = f"joint_blocks.{i}." + (
            "context_block" if "context" in part or "add" in part else "x_block"
        )
        if found := re.fullmatch(r"(attn2?)\.(?:to_q|add_q_proj)", part):
            own = ["to_q", "to_k", "to_v"] if "to_q" in part else [f"add_{p}_proj" for p in "qkv"]
            of = [f"transformer_blocks.{i}.{found[1]}.{p}.{kind}" for p in own]
            made[f"{stream}.{found[1]}.qkv.{kind}"] = {"of": of}
            continue
        if re.fullmatch(r"attn2?\.(to_[kv]|add_[kv]_proj)", part):
            continue
        for ours, theirs in [
            ("norm1_context.linear", "adaLN_modulation.1"),
            ("norm1.linear", "adaLN_modulation.1"),
            ("norm_added_", "ln_"),
            ("norm_", "ln_"),
            ("to_out.0", "proj"),
            ("to_add_out", "proj"),
            ("ff_context.net.0.proj", "mlp.fc1"),
            ("ff_context.net.2", "mlp.fc2"),
            ("ff.net.0.proj", "mlp.fc1"),
            ("ff.net.2", "mlp.fc2"),
        ]:
            new = part.replace(ours, theirs)
            if new != part:
                break
        swap = part == "norm1_context.linear" and int(i) == last
        made[f"{stream}.{new}.{kind}"] = {"of": [name], "swap": swap}
    return made


def flux_file(tensors):
    made = {}
    for name in tensors:
        found = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.*)\.(weight|bias)", name)
        if not found:
            made[outside(name, FLUX)] = {"of": [name], "swap": name.startswith("norm_out")}
            continue
        single, i, part, kind = found.groups()
        block = name.removesuffix(f"{part}.{kind}")
        if re.fullmatch(r"attn\.(to_[kv]|add_[kv]_proj)|proj_mlp", part):
            continue
        theirs = f"{'single' if single else 'double'}_blocks.{i}."
        if part == "attn.to_q" and single:
            own = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
            made[f"{theirs}linear1.{kind}"] = {"of": [f"{block}{p}.{kind}" for p in own]}
        elif part in ("attn.to_q", "attn.add_q_proj"):
            stream = "img" if part == "attn.to_q" else "txt"
            own = ["to_q", "to_k", "to_v"] if stream == "img" else [f"add_{p}_proj" for p in "qkv"]
            of = [f"{block}attn.{p}.{kind}" for p in own]
            made[f"{theirs}{stream}_attn.qkv.{kind}"] = {"of": of}
        elif found := re.fullmatch(r"attn\.norm_(added_)?([qk])", part):
            norm = f"norm.{'query' if found[2] == 'q' else 'key'}_norm.scale"
            stream = "" if single else ("txt_attn." if found[1] else "img_attn.")
            made[f"{theirs}{stream}{norm}"] = {"of": [name]}
        else:
            new = {
                "norm.linear": "modulation.lin",
                "proj_out": "linear2",
                "norm1.linear": "img_mod.lin",
                "norm1_context.linear": "txt_mod.lin",
                "attn.to_out.0": "img_attn.proj",
                "attn.to_add_out": "txt_attn.proj",
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
            }[part]
            made[f"{theirs}{new}.{kind}"] = {"of": [name]}
    return made


def put_together(made, tensors):
    """The file's tensors."""
    whole = {}
    for name, how in made.items():
        tensor = (
            torch.cat([tensors[part] for part in how["of"]])
            if how["of"][1:]
            else tensors[how["of"][0]]
        )
        if how.get("swap"):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if how.get("transpose"):
            tensor = tensor.T
        whole[name] = tensor.reshape(how.get("shape", tensor.shape)).contiguous()
    return whole


def same(name, found, expected):
    """Fails unless diffusers' conversion gives the folder's tensors."""
    rename = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for old, new in rename.items():
        expected = {
            k.replace(f"attentions.0.{old}.", f"attentions.0.{new}."): v
            for k, v in expected.items()
        }

    def strip(tensors):
        return {k.removeprefix("text_model."): v for k, v in tensors.items()}

    found, expected = strip(found), strip(expected)
    wrong = set(found) ^ set(expected)
    wrong |= {
        k
        for k in set(found) & set(expected)
        if not torch.equal(found[k].reshape(expected[k].shape), expected[k])
    }
    if wrong:
        raise AssertionError(f"{name}: diffusers' conversion differs in {sorted(wrong)[:8]}")


def open_clip_conversion(whole, prefix, tensors):
    """diffusers' conversion, which asks a model for its width only."""
    width = next(
        t.shape[0] for name, t in tensors.items() if name.endswith("final_layer_norm.bias")
    )
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    return sfu.convert_open_clip_checkpoint(model, whole, prefix)


def flux_conversion(config):
    """diffusers' conversion, which knows the published width only."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    source = inspect.getsource(sfu.convert_flux_transformer_checkpoint_to_diffusers)
    if "inner_dim = 3072" not in source:
        raise AssertionError("diffusers' conversion of FLUX has changed")
    scope = dict(vars(sfu))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"]


def parts_of(folder):
    """(part, prefix in the file, what its tensors are made of, diffusers' conversion)."""

    def config(part):
        return json.loads((folder / part / "config.json").read_text())

    network = "unet" if (folder / "unet").is_dir() else "transformer"
    net, tensors = config(network), load_part(folder / network)
    unet = "model.diffusion_model."
    if network == "unet":
        made = unet_file(tensors, net)
        yield network, unet, made, lambda whole: sfu.convert_ldm_unet_checkpoint(whole, net)
    elif "SD3" in net["_class_name"]:
        made = sd3_file(tensors, net)
        yield network, unet, made, sfu.convert_sd3_transformer_checkpoint_to_diffusers
    else:
        made = flux_file(tensors)
        yield network, unet, made, flux_conversion(net)
    vae = config("vae")
    made = vae_file(load_part(folder / "vae"), len(vae["block_out_channels"]))
    prefix = "first_stage_model." if network == "unet" or "SD3" in net["_class_name"] else "vae."

    def convert_vae(whole):
        return sfu.convert_ldm_vae_checkpoint(whole, vae)

    yield "vae", prefix, made, convert_vae if prefix != "vae." else None
    first = load_part(folder / "text_encoder")
    xl = net.get("addition_embed_type") == "text_time"
    if network == "unet" and net.get("use_linear_projection") and not xl:
        made = open_clip_file(first, extra_layer=1)
        prefix, extra = (
            "cond_stage_model.model.",
            f"layers.{config('text_encoder')['num_hidden_layers']}.",
        )

        def convert(whole):
            return {
                # diffusers leaves the last layer out by its number in the published model.
                name: tensor
                for name, tensor in open_clip_conversion(whole, prefix, first).items()
                if extra not in name
            }

        yield "text_encoder", prefix, made, convert
    elif network == "unet":
        prefix = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
        yield "text_encoder", prefix, clip_file(first), sfu.convert_ldm_clip_checkpoint
    else:
        made = clip_file(first)
        clip = "text_encoders.clip_l.transformer."
        yield "text_encoder", clip, made, lambda whole: sfu.convert_ldm_clip_checkpoint(whole, clip)
    if xl:
        second = load_part(folder / "text_encoder_2")
        prefix = "conditioner.embedders.1.model."

        def convert(whole):
            return open_clip_conversion(whole, prefix, second)

        yield "text_encoder_2", prefix, open_clip_file(second, 0), convert
    elif network == "transformer":
        names = ["text_encoder_2", "text_encoder_3"]
        for name in names:
            if not (folder / name).is_dir():
                continue
            t5 = config(name)["model_type"] == "t5"
            prefix = f"text_encoders.{'t5xxl' if t5 else 'clip_g'}.transformer."
            tensors = load_part(folder / name)
            made = {n: {"of": [n]} for n in tensors} if t5 else clip_file(tensors)
            yield name, prefix, made, None


NAMES = ["sd15", "sd21", "sdxl", "sd3", "sd35m", "flux-dev", "flux-schnell"]


def main():
    (GOLDEN / "single").mkdir(exist_ok=True)
    for folder in map(GOLDEN.joinpath, NAMES):
        record, proven = {}, []
        for part, prefix, made, convert in parts_of(folder):
            tensors = load_part(folder / part)
            whole = {prefix + n: t for n, t in put_together(made, tensors).items()}
            if convert:
                same(f"{folder.name} {part}", convert(dict(whole)), tensors)
                proven.append(part)
            for name, how in made.items():
                own = {key: value for key, value in how.items() if value and key != "of"}
                record[prefix + name] = [part, " ".join(how["of"])] + [own] * bool(own)
        text = json.dumps(record, separators=(",", ":"))
        (GOLDEN / "single" / f"{folder.name}.json").write_text(text + "\n")
        print(
            f"{folder.name}: {len(record)} tensors, {len(text)} bytes; "
            f"by diffusers: {', '.join(proven)}"
        )


if __name__ == "__main__":
    sys.exit(main())
