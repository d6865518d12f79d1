"""One training loop: on one process or, under torchrun, on several that share every step.

Data follow from the step alone, so a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, distributed
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgevlm.core.errors import ConfigError
from edgevlm.distill import data
from edgevlm.distill.facts import FactsHead
from edgevlm.distill.publish import publish
from edgevlm.distill.recipe import TrainRecipe
from edgevlm.distill.run import Run, keep_recipe, resume, save
from edgevlm.distill.vocabulary import encoder, save_tokenizer, texts_of, train_tokenizer
from edgevlm.evaluation.scenes import make_scene
from edgevlm.models.vlm import Vlm

Report = Callable[[dict[str, float]], None]


def train(recipe: TrainRecipe, folder: Path, cache: Path, *, report: Report) -> Vlm:
    """Train to the recipe's last step, resuming what ``folder`` holds, and save the model there."""
    with process_group() as (rank, world):
        if recipe.optimization.batch_images % world:
            raise ConfigError(f"batch_images ({recipe.optimization.batch_images}) must divide by {world} processes")
        if rank == 0:
            keep_recipe(recipe, folder)
        run = start(recipe, folder, cache, rank, world)
        resume(run, folder)
        for entry in steps(run):
            if rank == 0:
                _log(run, folder, entry, report)
                if run.step % recipe.save_every == 0 or run.step == recipe.optimization.steps:
                    save(run, folder)
        if rank == 0:
            publish(run.model, recipe, folder)
    return run.model.eval()


def start(recipe: TrainRecipe, folder: Path, cache: Path, rank: int, world: int) -> Run:
    """A run at step 0: tokenizer, pictures, fresh weights."""
    if rank == 0:
        make_tokenizer(recipe, folder)
        data.rendered(recipe, cache)
    if world > 1:
        distributed.barrier()  # the others read what rank 0 has written
    encode = encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    pictures = data.rendered(recipe, cache)
    model = Vlm(recipe.model)
    model.initialize(recipe.seed)
    torch.manual_seed(recipe.seed)
    facts = FactsHead(recipe.model.vision.feature_size)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch leaves it out of its annotations
    rate, decay = recipe.optimization.learning_rate, recipe.optimization.weight_decay
    optimizer = torch.optim.AdamW(parameter_groups(model, facts, decay), lr=rate, betas=(0.9, 0.98))
    return Run(recipe, model, facts, optimizer, encode, pictures, rank, world)


def steps(run: Run) -> Iterator[dict[str, float]]:
    """Take every step that is left; yield what was measured at each."""
    run.model.train()
    while run.step < run.recipe.optimization.steps:
        began = time.perf_counter()
        batch = make_batch(run)
        losses = losses_of(run.model, run.facts, batch, run.recipe.optimization.facts_weight)
        run.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        share_gradients(run)
        optimization = run.recipe.optimization
        for group in run.optimizer.param_groups:
            group["lr"] = optimization.rate(run.step)
        norm = torch.nn.utils.clip_grad_norm_(run.parameters(), optimization.gradient_clip)
        run.optimizer.step()
        run.step += 1
        seconds = time.perf_counter() - began
        measured = {name: value.item() for name, value in losses.items()}
        yield {"step": run.step, **measured, "gradient_norm": norm.item(), "seconds": seconds}


def losses_of(model: Vlm, facts: FactsHead, batch: data.Batch, facts_weight: float) -> dict[str, Tensor]:
    """Cross-entropy of the answers, of the grid's facts, and their weighted sum; bfloat16 inside."""
    pixels = batch.pixel_values.contiguous(memory_format=torch.channels_last)
    with (
        torch.autocast("cpu", torch.bfloat16),
        sdpa_kernel(SDPBackend.MATH),
    ):  # on CPUs flash's backward is slow
        features = model.vision_encoder(pixels)
        hidden = answer_states(model, features, batch)
        logits = model.logits(hidden)
        seen = facts(features, batch.scenes)
    answers = F.cross_entropy(logits.float(), batch.targets[batch.targets != data.IGNORED])
    return {"loss": answers + facts_weight * seen, "answers": answers, "facts": seen}


def answer_states(model: Vlm, features: Tensor, batch: data.Batch) -> Tensor:
    """The decoder's hidden states (rows, D) where a target stands."""
    image_features = model.projector(features)
    N = image_features.shape[1]
    embeds = model.embed_tokens(batch.input_ids).to(image_features.dtype)
    rows = torch.cat((embeds[:, :1], image_features, embeds[:, 1 + N :]), dim=1)
    hidden = model.decoder(rows, positions=batch.positions, mask=batch.mask)
    return hidden[batch.targets != data.IGNORED]


def make_batch(run: Run) -> data.Batch:
    """This process's share of the current step's batch."""
    settings, size = run.recipe.data, run.recipe.optimization.batch_images // run.world
    generator = np.random.Generator(np.random.PCG64([run.recipe.seed, run.step, run.rank]))
    chosen = epoch_slice(settings.num_scenes, run.step, run.recipe.optimization.batch_images, run.recipe.seed)
    mine = chosen[run.rank * size : (run.rank + 1) * size]
    scenes = [make_scene(settings.seed, int(index)) for index in mine]
    packed = [
        data.pack(
            data.shuffled_with_caption(scene, generator, captioned=settings.captioned),
            run.encode,
            run.recipe.model.num_vision_tokens,
            chained=bool(generator.random() < settings.chained),
        )
        for scene in scenes
    ]
    jitter = generator.uniform(-settings.jitter, settings.jitter, (size, 2)) * [1.0, 0.5] + [1.0, 0.0]
    contrast = torch.from_numpy(jitter.astype(np.float32))
    pixels = data.normalized(run.pictures[mine], run.recipe.mean, run.recipe.std, contrast=contrast)
    return data.collate(packed, pixels, scenes)


def epoch_slice(num_scenes: int, step: int, batch: int, seed: int) -> NDArray[np.int64]:
    """The scenes of one step: every epoch is a new order of all of them."""
    per_epoch = num_scenes // batch
    epoch, place = divmod(step, per_epoch)
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_scenes)
    return order[place * batch : (place + 1) * batch]


def make_tokenizer(recipe: TrainRecipe, folder: Path) -> None:
    """Train the run's tokenizer on the first scenes' texts, unless it is there already."""
    if (folder / "tokenizer.json").exists():
        return
    scenes = (make_scene(recipe.data.seed, index) for index in range(min(recipe.data.num_scenes, 4000)))
    texts = (text for scene in scenes for text in texts_of(scene))
    save_tokenizer(train_tokenizer(texts, recipe.model.decoder.vocab_size), folder)


def parameter_groups(model: Vlm, facts: FactsHead, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms, biases and embeddings do not."""
    named = [
        *model.named_parameters(),
        *((f"facts.{name}", tensor) for name, tensor in facts.named_parameters()),
    ]
    matrices = [tensor for name, tensor in named if tensor.ndim > 1 and "embed" not in name]
    rest = [tensor for name, tensor in named if not (tensor.ndim > 1 and "embed" not in name)]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def share_gradients(run: Run) -> None:
    """Average the gradients of all processes."""
    if run.world == 1:
        return
    gradients = [parameter.grad for parameter in run.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= run.world
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """This process's rank and the number of processes, as torchrun set them."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        distributed.init_process_group("gloo")
    try:
        yield rank, world
    finally:
        if world > 1:
            distributed.destroy_process_group()


def _log(run: Run, folder: Path, entry: dict[str, float], report: Report) -> None:
    if run.step % run.recipe.log_every == 0:
        with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: round(value, 5) for name, value in entry.items()}) + "\n")
        report(entry)
