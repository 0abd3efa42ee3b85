"""The four families: image features and their layout, positions, splitting of batches, wrappers."""

import pytest
import torch
from helpers import MIXED_ROWS, make_batch, noise_image
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from torch import nn
from transformers import DynamicCache

from rl_lvr.models import family_of

TOLERANCE = 1e-4


def forward_inputs(family, batch):
    """What a forward takes of a batch. `mm_token_type_ids` is left out: positions are explicit."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]} | {
        key: batch[key] for key in family.image_keys if key in batch
    }


@torch.no_grad()
def hidden_states(family, model, batch, positions):
    return family.core(model)(**forward_inputs(family, batch), position_ids=positions).last_hidden_state


def single_row(processor, row):
    """The row alone, hence without padding."""
    return make_batch(processor, [row])


# ---- image features


@torch.no_grad()
def test_image_features_are_what_the_text_model_receives(tiny):
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, MIXED_ROWS)
    received = []
    handle = family.core(model).language_model.register_forward_pre_hook(
        lambda module, args, kwargs: received.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**batch)
    handle.remove()
    at_images = received[0][batch["input_ids"] == family.placeholder_ids(processor)["image"]]
    features = family.image_features(model, batch)
    assert len(features) == family.count_images(batch) == 3
    assert all(f.shape[1] == family.hidden_size for f in features)
    assert torch.equal(torch.cat(features), at_images)
    assert not torch.allclose(torch.cat(features[::-1]), at_images, atol=1e-2)  # images in another order


@torch.no_grad()
def test_token_grid_is_row_major_over_the_whole_image(tiny, monkeypatch):
    """Without attention a token depends on its own pixels alone: paint one cell, see which token moves."""
    model, processor = tiny
    family = family_of(model)
    projections = [
        module
        for part in family.vision_parts(model)["tower"]
        for name, module in part.named_modules()
        if name.endswith(("attn.proj", "attn.out_proj", "attention.projection_layer"))
    ]
    assert len(projections) == 2  # one in each block
    for module in projections:
        monkeypatch.setattr(module, "forward", torch.zeros_like)
    blank = Image.new("RGB", (112, 56), (90, 90, 90))
    base = make_batch(processor, [([blank], "what")])
    (grid,) = family.token_grid(base)
    assert grid.rows * grid.cols > 1
    (before,) = family.image_features(model, base)
    width, height = blank.width / grid.cols, blank.height / grid.rows
    moved = []
    for row in range(grid.rows):
        for col in range(grid.cols):
            painted = blank.copy()
            x, y = col * width, row * height
            # Well inside the cell, so that resizing does not smear it into the next.
            ImageDraw.Draw(painted).rectangle(
                (x + 0.4 * width, y + 0.4 * height, x + 0.6 * width, y + 0.6 * height), (255, 0, 0)
            )
            (after,) = family.image_features(model, make_batch(processor, [([painted], "what")]))
            change = (after - before).abs().amax(-1)[grid.offset : grid.offset + grid.rows * grid.cols]
            assert (change > 1e-3).sum() == 1
            moved.append(int(change.argmax()))
    assert moved == list(range(grid.rows * grid.cols))


# ---- positions


@pytest.mark.parametrize("side", ["right", "left"])
def test_prefill_positions_give_each_row_what_it_has_alone(tiny, side):
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, MIXED_ROWS, padding_side=side)
    positions = family.positions(model, batch["input_ids"], batch["attention_mask"], batch)
    padded = hidden_states(family, model, batch, positions.prefill)
    for index, row in enumerate(MIXED_ROWS):
        alone = single_row(processor, row)
        alone.pop("mm_token_type_ids", None)
        own = family.positions(model, alone["input_ids"], alone["attention_mask"], alone)
        expected = hidden_states(family, model, alone, own.prefill)[0]
        found = padded[index][batch["attention_mask"][index].bool()]
        assert (found - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_prefill_positions_agree_with_the_models_own(tiny):
    """Right-padded: transformers itself is right there, if it is given everything it asks for."""
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, MIXED_ROWS, padding_side="right")
    own = family.core(model)(**batch).last_hidden_state
    positions = family.positions(model, batch["input_ids"], batch["attention_mask"], batch)
    ours = hidden_states(family, model, batch, positions.prefill)
    valid = batch["attention_mask"].bool()
    assert (ours - own)[valid].abs().max() < TOLERANCE
    # Negative control: plain positions are far off where positions have three parts.
    count = batch["attention_mask"].cumsum(-1) - 1
    plain = hidden_states(family, model, batch, count)
    far = (plain - own)[valid].abs().max()
    if positions.prefill.ndim == 3:
        assert far > 1e-2
    else:
        assert far < TOLERANCE


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_decoding_step_by_step_equals_the_full_forward(tiny, side):
    model, processor = tiny
    family = family_of(model)
    prompt = make_batch(processor, MIXED_ROWS, padding_side=side)
    extra = torch.randint(len(processor.tokenizer) - 20, len(processor.tokenizer), (3, 4))
    positions = family.positions(model, prompt["input_ids"], prompt["attention_mask"], prompt)

    core, cache = family.core(model), DynamicCache(config=model.config.get_text_config())
    core(
        **forward_inputs(family, prompt),
        position_ids=positions.prefill,
        past_key_values=cache,
        use_cache=True,
    )
    mask, steps = prompt["attention_mask"], []
    for step in range(extra.shape[1]):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        out = core(
            input_ids=extra[:, step : step + 1],
            attention_mask=mask,
            position_ids=positions.decode(step),
            past_key_values=cache,
            use_cache=True,
        )
        steps.append(out.last_hidden_state)
    stepwise = torch.cat(steps, 1)

    whole = dict(prompt, input_ids=torch.cat([prompt["input_ids"], extra], 1), attention_mask=mask)
    full = family.positions(model, whole["input_ids"], mask, whole)
    expected = hidden_states(family, model, whole, full.prefill)[:, -extra.shape[1] :]
    assert (stepwise - expected).abs().max() < TOLERANCE
    assert torch.equal(positions.decode(3), full.prefill[..., -1:])
    assert torch.equal(full.first_free, positions.first_free + extra.shape[1])
    # Negative control: off by ten positions is seen.
    out = hidden_states(family, model, whole, full.prefill + 10 * (torch.arange(mask.shape[1]) >= mask.shape[1] - 4))
    assert (out[:, -4:] - expected).abs().max() > 1e-2


def test_positions_keep_nothing_on_the_model(tiny):
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, MIXED_ROWS)
    positions = family.positions(model, batch["input_ids"], batch["attention_mask"], batch)
    hidden_states(family, model, batch, positions.prefill)
    assert getattr(family.core(model), "rope_deltas", None) is None


def test_positions_of_selected_rows(tiny):
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, MIXED_ROWS)
    positions = family.positions(model, batch["input_ids"], batch["attention_mask"], batch)
    chosen = positions.select(torch.tensor([2, 0, 0]))
    assert torch.equal(chosen.prefill, positions.prefill[..., [2, 0, 0], :])
    assert torch.equal(chosen.decode(1), positions.decode(1)[..., [2, 0, 0], :])


# ---- batches


def test_split_and_join_give_the_batch_back(tiny):
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, MIXED_ROWS)
    whole = family.image_inputs(batch)
    rows = family.split_images(batch, [1, 0, 2])
    assert [family.count_images(row) for row in rows] == [1, 0, 2]
    assert rows[1] == {}
    again = family.join_images(rows)
    assert set(again) == set(whole)
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    assert family.join_images([]) == {}


@torch.no_grad()
def test_rows_may_be_reordered_and_repeated(tiny):
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, MIXED_ROWS)
    rows = family.split_images(batch, [1, 0, 2])
    order = [2, 1, 0, 0]
    mixed = {key: batch[key][order] for key in ("input_ids", "attention_mask")}
    mixed |= family.join_images([rows[i] for i in order])
    positions = family.positions(model, batch["input_ids"], batch["attention_mask"], batch)
    expected = hidden_states(family, model, batch, positions.prefill)[order]
    found = hidden_states(family, model, mixed, positions.select(torch.tensor(order)).prefill)
    assert (found - expected).abs().max() < TOLERANCE
    # Negative control: the images in another order than the rows.
    wrong = family.image_features(model, family.join_images([rows[i] for i in (0, 1, 2, 0)]))
    right = family.image_features(model, mixed)
    assert any(a.shape != b.shape or not torch.allclose(a, b) for a, b in zip(wrong, right, strict=True))


@torch.no_grad()
def test_rows_of_other_batches_join(tiny):
    """One batch at a time or all at once: the same images."""
    model, processor = tiny
    family = family_of(model)
    whole = family.image_features(model, make_batch(processor, MIXED_ROWS))
    parts = [family.split_images(make_batch(processor, [row]), [len(row[0])])[0] for row in MIXED_ROWS]
    joined = family.image_features(model, family.join_images(parts))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, joined, strict=True))


def test_the_whole_model_takes_joined_images_and_labels(tiny):
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, MIXED_ROWS)
    expected = model(**batch, labels=batch["input_ids"]).loss
    batch |= family.join_images(family.split_images(batch, [1, 0, 2]))
    assert torch.equal(model(**batch, labels=batch["input_ids"]).loss, expected)


def test_a_count_that_does_not_fit_is_refused(tiny):
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, MIXED_ROWS)
    with pytest.raises(ValueError, match="3 images cannot be split"):
        family.split_images(batch, [1, 1, 2])


def test_text_alone_has_no_images(tiny):
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, [([], "what is next"), ([], "red")])
    assert family.image_inputs(batch) == {}
    assert family.count_images(batch) == 0
    assert family.split_images(batch, [0, 0]) == [{}, {}]
    assert family.image_features(model, batch) == family.token_grid(batch) == []
    positions = family.positions(model, batch["input_ids"], batch["attention_mask"])
    assert positions.first_free.tolist() == batch["attention_mask"].sum(-1).tolist()


# ---- ids, modules, wrappers


def test_placeholder_ids_are_complete(tiny, family_name):
    model, processor = tiny
    ids = family_of(model).placeholder_ids(processor)
    assert ids == family_of(model).placeholder_ids(processor.tokenizer)
    named = set(processor.tokenizer.convert_ids_to_tokens(list(ids.values())))
    assert named == {
        "qwen2_5_vl": {
            "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
        },
        "internvl": {"<IMG_CONTEXT>", "<img>", "</img>", "<video>"},
        "llava_onevision": {"<image>", "<video>"},
    }[family_name.replace("qwen3_vl", "qwen2_5_vl")]  # fmt: skip


def test_vision_parts_hold_every_parameter_before_the_text_model(tiny):
    model, _ = tiny
    family = family_of(model)
    parts = family.vision_parameters(model)
    assert set(parts) == {"tower", "merger"}
    assert all(parts.values())
    ours = [id(p) for group in parts.values() for p in group]
    text = {id(p) for p in family.core(model).language_model.parameters()}
    expected = {id(p) for p in family.core(model).parameters()} - text
    assert set(ours) == expected
    assert len(ours) == len(expected)  # no parameter in both parts
    assert len(family.text_layers(model)) == 2
    assert family.head(model) is model.lm_head


@torch.no_grad()
def test_wrappers_change_nothing(tiny):
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, MIXED_ROWS)
    features = family.image_features(model, batch)
    positions = family.positions(model, batch["input_ids"], batch["attention_mask"], batch)
    hidden = hidden_states(family, model, batch, positions.prefill)

    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    distributed = nn.Module()
    distributed.module = wrapped
    for outer in (wrapped, distributed):
        assert type(family_of(outer)) is type(family)
        assert family.core(outer) is model.model
        assert family.head(outer) is model.lm_head
        again = family.positions(outer, batch["input_ids"], batch["attention_mask"], batch)
        assert torch.equal(again.prefill, positions.prefill)
        assert all(map(torch.equal, family.image_features(outer, batch), features))
        assert torch.equal(hidden_states(family, outer, batch, again.prefill), hidden)  # B starts at zero
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    changed = hidden_states(family, wrapped, batch, positions.prefill)
    assert (changed - hidden).abs().max() > 1e-2  # the adapter is inside the core


def test_image_features_carry_gradients_where_asked(tiny):
    model, processor = tiny
    family = family_of(model)
    batch = make_batch(processor, [([noise_image(0)], "what")])
    family.image_features(model, batch)[0].square().sum().backward()
    grads = [p.grad for p in family.vision_parameters(model)["merger"]]
    assert any(g is not None and g.abs().max() > 0 for g in grads)
