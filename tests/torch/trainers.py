"""Trainings under Accelerate, the Hugging Face Trainer and Lightning: a program that tests start.

    python trainers.py FOLDER WORLD NAME ...

For each name it forks the processes of one trainer, as torchrun would start them. What a process
has found, or the error that it raises, is left in a file of the folder.
"""

import importlib
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import geotucker as gt
from geotucker_torch import TDLRT, factorize, metrics

STEPS, SAVED = 12, 8  # of the optimizer, each of two batches on each process


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 3))


def tdlrt(model: nn.Module) -> TDLRT:
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return TDLRT(adamw, model, ranks=gt.Budget(parameters=0.6, steps=10))


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 16, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def found(model: nn.Module, optimizer: TDLRT, **others: Any) -> dict[str, Any]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"state": state, "ranks": optimizer.ranks, "seconds": optimizer.seconds, **others}


def accelerate(folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, log_with="tensorboard", project_dir=folder
    )
    accelerator.init_trackers("logs")

    def train(first: int, stop_at: int | None = None) -> dict[str, Any]:
        accelerator.free_memory()  # it would save and load all that it has prepared so far
        torch.manual_seed(accelerator.process_index)
        model: Any = factorize(body(), {"0": 8}, verbose=False)
        optimizer: Any = tdlrt(model)
        scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
        loader: Any = DataLoader(dataset(), 4)
        model, optimizer, loader, scheduler = accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        if first:
            accelerator.load_state(str(folder / "state"))
        step = first
        for _ in range(first, STEPS, 4):
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(x), y))
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if not accelerator.sync_gradients:
                    continue
                step += 1
                if stop_at is None:
                    accelerator.log(metrics(optimizer), step=step)
                if step == stop_at and accelerator.is_main_process:
                    accelerator.set_trigger()  # one process decides, all stop
                if accelerator.check_trigger():
                    return {"stopped": step}
                if step == SAVED and not first:
                    accelerator.save_state(str(folder / "state"))
        wrapped = isinstance(model, DistributedDataParallel)
        return found(accelerator.unwrap_model(model), optimizer.optimizer, wrapped=wrapped)

    return {"unbroken": train(0), "resumed": train(SAVED), **train(0, stop_at=3)}


class WithLoss(nn.Module):
    """What the Hugging Face Trainer takes for a model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def transformers(folder: Path) -> dict[str, Any]:
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

    class LoggedTrainer(Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, **metrics(self.optimizer)}, *args, **kwargs)

    data = [{"x": x, "labels": y} for x, y in dataset()]

    def train(resume: bool = False, **changes: Any) -> Any:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "logs")
        arguments = TrainingArguments(
            output_dir=str(folder / "runs"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            max_grad_norm=1.0,
            logging_steps=2,
            save_steps=SAVED,
            report_to="tensorboard" if not changes and not resume else "none",
            use_cpu=True,
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            **changes,
        )
        torch.manual_seed(arguments.process_index)
        model: Any = factorize(WithLoss(), {"body.0": 8}, verbose=False)
        early = [EarlyStoppingCallback(early_stopping_patience=1)] if changes else []
        trainer: Any = LoggedTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            eval_dataset=data,
            callbacks=early,
            optimizers=(tdlrt(model), None),
        )
        saved = str(folder / "runs" / f"checkpoint-{SAVED}")
        trainer.train(resume_from_checkpoint=saved if resume else None)
        wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
        optimizer = trainer.optimizer.optimizer
        return found(model, optimizer, wrapped=wrapped, stopped=trainer.state.global_step)

    # A higher loss is asked for, so that the first is the best, and loaded at the end.
    early = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "best",
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "load_best_model_at_end": True,
    }
    unbroken, resumed = train(), train(resume=True)
    stopped = train(**early)
    return {
        "unbroken": unbroken,
        "resumed": resumed,
        "stopped": stopped["stopped"],
        "best": {name: tuple(t.shape) for name, t in stopped["state"].items() if "core" in name},
    }


def lightning(folder: Path) -> dict[str, Any]:
    import lightning as L
    from lightning.pytorch.callbacks import EarlyStopping
    from lightning.pytorch.loggers import TensorBoardLogger

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()
            factorize(self, {"body.0": 8}, verbose=False)

        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.body(x), y)
            self.is_wrapped = isinstance(self.trainer.strategy.model, DistributedDataParallel)
            self.log_dict({"loss": loss, **metrics(self.optimizers())})
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = tdlrt(self)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)]

    def train(steps: int, resume: str | None = None, callbacks: Any = ()) -> Any:
        torch.manual_seed(int(os.environ["RANK"]))
        model = Classifier()
        trainer = L.Trainer(
            accelerator="cpu",
            strategy="ddp",
            devices=int(os.environ["WORLD_SIZE"]),
            max_epochs=steps // 4,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            logger=TensorBoardLogger(str(folder), "logs") if steps == STEPS else False,
            log_every_n_steps=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=str(folder),
            callbacks=list(callbacks),
        )
        trainer.fit(model, DataLoader(dataset(), 4), ckpt_path=resume)
        if steps == SAVED:
            trainer.save_checkpoint(folder / "saved.ckpt")
        optimizer: Any = trainer.optimizers[0]
        return found(model, optimizer, wrapped=model.is_wrapped, stopped=trainer.global_step)

    unbroken = train(STEPS)
    train(SAVED)
    resumed = train(STEPS, str(folder / "saved.ckpt"))
    early = EarlyStopping("loss", mode="max", patience=1, check_on_train_epoch_end=True)
    stopped = train(10 * STEPS, callbacks=[early])["stopped"]
    return {"unbroken": unbroken, "resumed": resumed, "stopped": stopped}


TRAINERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    f.__name__: f for f in (accelerate, transformers, lightning)
}


# What a training imports, beyond the trainer's package where it comes lazily.
IMPORTED = {
    "accelerate": ["accelerate", "torch.utils.tensorboard"],
    "transformers": ["transformers.trainer", "torch.utils.tensorboard"],
    "lightning": ["lightning", "torch.utils.tensorboard"],
}


def work(folder: Path, name: str, rank: int) -> None:
    try:
        result: Any = TRAINERS[name](folder / name)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, folder / f"{name}.{rank}")
    sys.stdout.flush()
    os._exit(0)


def main(folder: Path, world: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (folder / name).mkdir()
        for module in IMPORTED[name]:  # once, for all processes
            importlib.import_module(module)
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "GROUP_RANK": "0",
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "none",
                    "ACCELERATE_USE_CPU": "true",
                }
                work(folder, name, rank)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
