"""A deployment: a published model, a video's size and a number of GPUs, as `estimate` and `bench` take it. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semvid.runtime import settings
from semvid.runtime.attention.schedule import Dense, Refresh, Reuse, plan
from semvid.runtime.config import Config, check_tokens
from semvid.runtime.models import folder, published
from semvid.runtime.models.published import Published

KEYS = {"model": str, "gpus": int}
ACCEPTED = {str: "a text", int: "a whole number"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """What a configuration with a [deployment] table asks for."""

    name: str
    model: Published
    config: Config
    gpus: int

    @property
    def tokens(self) -> int:
        """Video tokens of one sequence."""
        return self.model.geometry.tokens(self.config.video)

    @property
    def guided(self) -> bool:
        """Whether there are two branches."""
        return self.model.family.guided(self.config.video.guidance)

    @property
    def branches(self) -> int:
        """How many forward passes a step takes."""
        return 2 if self.guided else 1


def read(
    path: Path,
    preset: str | None = None,
    *,
    video: Mapping[str, Any] | None = None,
    gpus: int | None = None,
) -> Deployment:
    """Returns a deployment that semvid carries, by its name, or one of a TOML file.

    Args:
        path: the name or the file.
        preset: replaces the file's, as do the next two.
        video: options of [video].
        gpus: how many.

    Raises:
        ValueError: it can't be read, has no [deployment] with a known model, or asks for a size that does not fit.
    """
    table = settings.read_toml(settings.config_file(path), "--config")
    said = table.get("deployment")
    if not isinstance(said, dict) or set(said) - set(KEYS) or "model" not in said:
        accepted = f"a [deployment] with model and gpus, as {', '.join(settings.deployments())} have it"
        raise ValueError(f"--config is {str(path)!r}, whose [deployment] is {said!r}; accepted: {accepted}")
    for key, value in said.items():
        if type(value) is not KEYS[key]:
            raise ValueError(f"deployment.{key} is {value!r}; accepted: {ACCEPTED[KEYS[key]]}")
    model = published.read(said["model"], "deployment.model")
    # Nothing is generated: any prompt and picture serve.
    config = settings.resolve(table, {"video": {"prompt": "a deployment", **(video or {})}}, preset=preset)
    name = str(path) if str(path) in settings.deployments() else path.stem
    return made(name, model, config, said.get("gpus", 1) if gpus is None else gpus)


def made(name: str, model: Published, config: Config, gpus: int) -> Deployment:
    """Returns a deployment of its parts.

    Raises:
        ValueError: a size that the model can't make, anchors that it can't have, more clusters than tokens, a density
            below that of the stand-ins, or no GPU.
    """
    if gpus < 1:
        raise ValueError(f"--gpus is {gpus}; accepted: 1 or more")
    folder.check_size(config.video, model.geometry)
    folder.check_anchors(config.attention, model.family)
    check_tokens(config.attention, model.geometry.tokens(config.video), joint=model.family.joint)
    return Deployment(name=name, model=model, config=config, gpus=gpus)


def step_kinds(deployment: Deployment) -> dict[str, int]:
    """Returns how many steps of the video are dense, the first refresh, later refreshes, and reuses.

    With two transformers each has a first refresh; that the second's intervals begin anew then is not counted. Where
    intervals follow drift they are taken to double each time.
    """
    attention, steps = deployment.config.attention, deployment.config.video.steps
    counts = {"dense": 0, "first": 0, "refresh": 0, "reuse": 0}
    for todo in plan(attention, steps, attention.dense_layers + 1)[-1]:
        kind = {Dense: "dense", Refresh: "refresh", Reuse: "reuse"}[type(todo)]
        counts["first" if isinstance(todo, Refresh) and todo.seeded else kind] += 1
    more = min(len(deployment.model.family.transformers) - 1, counts["refresh"]) if counts["first"] else 0
    return counts | {"first": counts["first"] + more, "refresh": counts["refresh"] - more}
