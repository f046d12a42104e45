"""The straight line, without Flower: partition, train, upload, fuse, evaluate, report.

The Flower apps call the same functions, so both paths give the same bits.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import methods
from .client.private import train_privately
from .client.train import train_local
from .common.compute import forget_peak, peak_memory, resolve_device, threads
from .common.errors import ConfigError, RunError, UploadError
from .common.files import load_tensors
from .common.fingerprint import core
from .common.outside import short
from .common.progress import Progress
from .common.rng import secret, stream
from .common.workers import hired
from .config import Config, recipe
from .config.sections import ONE_SHOT, OWN
from .config.unread import unread_line
from .data.images import Images
from .data.own import Place
from .data.shares import class_names, client_images, known_parts, parts_of, server_images
from .ensemble.ensemble import Ensemble
from .judge import Lines, by_client, compare, evaluate_on, glimpse
from .methods.contract import DIVERGED, Fused, Job, Stopwatch
from .publish.hub import save_model, write_result
from .report.figures import save_images, save_partition
from .resolve import resolve
from .runs import result as report
from .runs.checkpoints import Checkpoints
from .runs.evaluation import Evaluation
from .runs.folder import RunFolder
from .screening.screen import screen
from .statistics.inputs import measure as measure_inputs
from .statistics.moments import frozen_features, measure, sent
from .uploads import cache as kept
from .uploads.gate import admit, require_finite, require_loss, require_model, shapes
from .uploads.upload import Upload, size
from .vit.build import Weights, build_vit, initial_weights
from .vit.taps import network_of

log = logging.getLogger("fedmitr")

# Settings that decide an upload. A run can be continued, or fused again, only if they stay as they were.
UPLOAD_SETTINGS: tuple[str, ...] = ("seed", "data.", "partition.", "model.", "local.", "upload.", "privacy.")
UPLOAD_SETTINGS += ("evaluate.where", "evaluate.holdout")

# Of these, what a later start may have otherwise: where files lie now, and which images the server tests on.
MOVABLE = ("data.path", "data.test-limit", "model.weights")

# And those that only add to the weights: a fusion may use less than was uploaded.
NARROWABLE = ("upload.extras",)

# What `fedmitr run` does not read, with the reason.
WITHOUT_FLOWER = dict.fromkeys(
    ("flower.rounds", "flower.options", "flower.node-wait", "flower.upload-timeout", "flower.clients"), "of Flower"
)


@dataclass(frozen=True)
class Outcome:
    weights: Mapping[str, Tensor] | None  # of the global model; None where the method keeps several
    result: dict[str, Any]


def run(config: Config, name: str | None = None) -> RunFolder:
    """The whole line in one process; `config.partition.clients` clients, one after the other."""
    if chosen := recipe.chosen_line(config):
        log.info("%s", chosen)
    if config.flower.strategy != ONE_SHOT:
        raise ConfigError(
            f"flower.strategy = {config.flower.strategy!r} runs in Flower only: fedmitr simulate; "
            f"or set method to one of: {', '.join(methods.available())}"
        )
    if without_effect := unread_line(config, methods.unread(config) | WITHOUT_FLOWER):
        log.warning("%s", without_effect)
    config = resolve(config)
    methods.check(config, config.partition.clients)
    if config.partition.scheme == OWN:
        raise ConfigError("partition.scheme = 'own' is for Flower's SuperNodes, which tell where the images are")
    if name and config.resume_from:
        raise ConfigError(f"--name {name} is of a new run folder, and resume-from is an old one; give one of them")
    parts_of(config)  # first: what cannot be dealt out or built leaves no folder
    initial = start_of(config)
    folder = continued(config) if config.resume_from else created(config, name)
    log.info("run folder: %s", folder.path)
    with folder.at_work():
        folder.note_start(initial)
        if missing := folder.missing():
            with Progress.of_clients(len(missing)) as progress:
                for client in missing:
                    take_upload(folder, client, initial, progress)
        serve(folder)
        if config.evaluate.where == "clients":
            if not folder.model_path.exists():
                fix = "use evaluate.where = 'server'"
                raise RunError(f"method = {config.method!r} makes no single model to evaluate; {fix}")
            weights = load_tensors(folder.model_path)[0]
            conclude_on_clients(folder, [evaluate_client(config, k, weights) for k in range(config.partition.clients)])
    return folder


def start_of(config: Config) -> Weights:
    """The weights that every client starts from.

    Raises:
        ModelError: they cannot be built or read.
        RunError: a number in them is NaN or infinite.
    """
    initial = initial_weights(config.model, config.seed)
    require_finite(initial, "give other weights", f"model.weights = {config.model.weights!r}")
    return initial


def created(config: Config, name: str | None) -> RunFolder:
    """A new run folder of this name; None: method, seed and time, and a number where there is one already.

    What cannot work is known now, not after the training, and leaves no folder: device, test images, partition.
    """
    resolve_device(config.device)
    if config.evaluate.where == "server":
        server_images(config)
        if config.partition.scheme != OWN:
            parts_of(config)
    if name is not None:
        return RunFolder.create(config, name)
    name = f"{short(config.method)}-{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    return RunFolder.create(config, name, or_next=True)


def take_upload(folder: RunFolder, client: int, initial: Weights, progress: Progress | None = None) -> None:
    """Train a client and keep its upload, if it passes the gate."""
    upload = train_client(folder.config, client, initial, progress=progress)
    folder.save_upload(admit(upload, folder.config, fingerprint=core()))


def train_client(
    config: Config,
    client: int,
    initial: Weights,
    *,
    place: Place | None = None,
    keep: Path | None = None,
    server_round: int = 1,
    prox_mu: float = 0.0,
    progress: Progress | None = None,
) -> Upload:
    """Train client `client` of `config.partition.clients` from `initial` on its own part of the data.

    With partition.scheme = "own" its images are in its own `place`. What it makes is kept in the file `keep`, if any,
    and taken from there when the same is asked again. `progress`, if given, is of several clients, one unit each.
    """
    images = client_images(config, client, place)[0]
    if keep is None:
        return _train(config, client, initial, images, server_round, prox_mu, progress)
    deciding = {name: value for name, value in config.to_flat().items() if name.startswith(UPLOAD_SETTINGS)}
    facts = {**deciding, "client": client, "round": server_round, "prox-mu": prox_mu}
    key = kept.key_of(facts, initial, images, resolve_device(config.device))
    return kept.once(keep, key, lambda: _train(config, client, initial, images, server_round, prox_mu, progress))


def _train(
    config: Config,
    client: int,
    initial: Weights,
    images: Images,
    server_round: int,
    prox_mu: float,
    shared: Progress | None,
) -> Upload:
    vit = build_vit(config.model)
    vit.load_state_dict(initial)
    if not shared:
        log.info("client %d: training on %d images", client, len(images))
    part = 1 / config.local.epochs if shared else 1.0  # of a unit, in each epoch
    own = nullcontext(shared) if shared else Progress(f"client {client}", config.local.epochs, "epochs")
    started = time.perf_counter()
    device, loss, epsilon = resolve_device(config.device), 0.0, None
    dtype = getattr(torch, config.upload.dtype)
    statistics: dict[str, Tensor] = {}
    with threads(config.local.threads), own as progress:
        if config.upload.statistics:  # first: of the weights that training changes
            features = frozen_features(vit, images, config.model, device)
            classes, variances = config.model.num_classes, config.upload.variances
            statistics |= sent(measure(features, images.labels, classes, variances=variances))
        if config.privacy.epsilon:  # the loss would tell of the images without noise
            epsilon = train_privately(vit, images, config, secret(), device, prox_mu, lambda: progress.update(part))
        else:
            rng = stream(config.seed, "local", server_round, client)
            loss = train_local(vit, images, config, rng, device, prox_mu, lambda loss: progress.update(part, loss=loss))
        try:  # what has diverged is not worth sending, and statistics cannot be had of it
            require_finite(vit.state_dict(), "lower local.lr", "its training")
        except RunError as error:
            raise UploadError(f"client {client}: {error}") from error
        if config.upload.moments:
            moments = measure_inputs(vit, images, config.model, device)
            statistics |= {name: _sent(tensor, dtype) for name, tensor in moments.items()}
    seconds = time.perf_counter() - started
    counts = torch.bincount(images.labels, minlength=config.model.num_classes)
    return Upload(
        client=client,
        weights={name: _sent(tensor, dtype) for name, tensor in vit.state_dict().items()},
        num_examples=len(images),
        train_loss=loss,
        fingerprint=core(),
        class_counts=tuple(counts.tolist()) if config.upload.counts else None,
        seconds=seconds,
        statistics=statistics or None,
        epsilon=epsilon,
    )


def evaluate_client(config: Config, client: int, weights: Weights, place: Place | None = None) -> Evaluation:
    """The global model on the part that the client held out of training (evaluate.where = clients)."""
    held = client_images(config, client, place)[1]
    own = {name: tensor.float() for name, tensor in weights.items()}  # some of Flower's strategies make float64 of them
    with threads(config.local.threads):
        return evaluate_on(network_of(config.model, own), held, config, resolve_device(config.device))


def serve(folder: RunFolder, lines: Lines | None = None, uploads: list[Upload] | None = None) -> Outcome:
    """The server phase from the uploads on disk: fuse, evaluate, write every output file. The folder's lock is held.

    One that was killed goes on with the checkpoints that it left in the folder. With the `lines` of these uploads
    known, this is one of many fusions: they are not evaluated or drawn again, and the ensemble is only where the method
    has asked one. The `uploads`, if given, are what `require_uploads` has given just now.

    Raises:
        RunError: fewer uploads than `flower.quorum` of the clients, or the model diverged; no model is written then.
        UploadError: an upload does not pass the gate.
    """
    config = folder.config
    if uploads is None:
        uploads = folder.require_uploads()
    device, stopwatch = resolve_device(config.device), Stopwatch()
    forget_peak(device)
    started = time.perf_counter()
    with threads(config.threads), hired(config.workers, config.ray_address, device) as workers:
        with stopwatch.stage("screening"):
            known = Checkpoints.of_any_method(folder.common_path, config, uploads, device)
            screened = screen(uploads, config, device, folder.log_metrics, known=known, workers=workers)
        stopwatch.add({"screening": screened.earlier})
        if screened.changed:
            uploads, lines = screened.kept, None
        on_server = config.evaluate.where == "server"
        judge = glimpse(config, device) if on_server and lines is None else None
        job = Job(
            uploads,
            methods.in_force(config),
            device,
            folder.log_metrics,
            stopwatch,
            work=folder.work_path,
            judge=judge,
            common=folder.common_path,
            workers=workers,
        )
        fused = methods.fuse(job)
        # Not every method reports its stages; after a resume, they sum to more than the clock.
        aside = stopwatch.seconds.get("evaluation", 0.0)
        cost = {
            "server_seconds": max(time.perf_counter() - started, sum(stopwatch.seconds.values())) - aside,
            "peak_memory": peak_memory(device),
        }
        fix = DIVERGED if "distillation" in stopwatch.seconds else "look at the uploads (screen.mode = 'warn')"
        if fused.weights is not None:
            require_model(fused.weights, config.model, fix)
        scores: dict[str, Any] = {"student": None}
        with stopwatch.stage("evaluation"):
            if on_server:
                student = evaluate_on(fused.predict, server_images(config)[0], config, device)
                require_loss(student.loss, fix)
            if fused.weights is not None:
                save_model(folder, fused.weights, class_names(config))
            if on_server:
                scores = compare(student, fused, uploads, config, device, lines, workers)
    measured = {**scores, **cost, "screen": screened.facts(config.screen.mode)}
    result = _report(folder, fused, job, measured, one_of_many=lines is not None)
    if on_server:
        folder.clear_work()
    return Outcome(fused.weights, result)


def conclude_on_clients(folder: RunFolder, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Write the clients' accuracy of the global model, weighted by their numbers of images, into result.json."""
    for each in evaluations:
        require_loss(each.loss, DIVERGED)
    total = sum(each.num_examples for each in evaluations)
    result = folder.read_result()
    student = sum(each.accuracy * each.num_examples for each in evaluations) / total
    result["accuracy"]["student"] = round(student, 2)
    result["evaluated_on"] = {"where": "clients", "images": total}
    write_result(folder, result)
    folder.clear_work()
    return result


def fuse(
    run_folder: RunFolder,
    method: str,
    overrides: Mapping[str, object],
    name: str | None = None,
    lines: Lines | None = None,
) -> RunFolder:
    """The server phase again, by another method or other settings, on the uploads of an earlier run.

    With a `name` for its folder, one that was begun there goes on behind what it had finished. `lines` as in `serve`.
    What cannot work is known before a folder is made.
    """
    before = run_folder.config
    config = recipe.settled(Config.from_flat({**overrides, "method": method}, base=before))
    methods.check(config, config.partition.clients)
    require_same_uploads(before, config, "to change it, make a new run")
    _require_same_start(run_folder, config)
    resolve_device(config.device)
    uploads = RunFolder(run_folder.path, config).require_uploads()
    if config.evaluate.where == "server":
        server_images(config)
    folder = run_folder.sub(short(method), config) if name is None else run_folder.begun(name, config)
    with folder.at_work():
        serve(folder, lines, uploads)
        folder.clear_work()  # also where the clients evaluate: they are not asked here
    return folder


def continued(config: Config) -> RunFolder:
    """The run folder `config.resume_from`, if `config` would give the same uploads and the run has not ended."""
    resolve_device(config.device)
    folder = RunFolder.open(config.resume_from)
    with folder.locked():
        if folder.finished and folder.read_result()["accuracy"]["student"] is not None:
            raise RunError(f"resume-from = {config.resume_from!r} has ended (result.json); use `fedmitr fuse`")
        if folder.config.flower.client_names != config.flower.client_names:
            # Clients are numbered by their places there: in another list an upload would be somebody else's.
            raise RunError(
                f"flower.clients = {config.flower.clients!r}, but the run numbered its clients by "
                f"{folder.config.flower.clients!r}; restore that list"
            )
        require_same_uploads(folder.config, config, "resume with the same settings, or make a new run")
        _require_same_start(folder, config)
        uploads = RunFolder(folder.path, config).load_uploads()
        folder.continue_with(config)
    if stale := [upload.client for upload in uploads if upload.fingerprint != core()]:
        log.warning("the uploads of clients %s were made by another version of the code", config.flower.labels(stale))
    return folder


def _require_same_start(folder: RunFolder, config: Config) -> None:
    """The file of weights may lie elsewhere now, but be no other: screening and frozen features start from it."""
    before, after = folder.config.model.weights, config.model.weights
    if before != after and not folder.is_start(start_of(config)):
        raise RunError(
            f"model.weights = {after!r} is not known to be what the clients started from ({before!r}); give that file"
        )


def require_same_uploads(before: Config, after: Config, fix: str) -> None:
    """Raise RunError, naming the setting, where the two would give different uploads."""
    old, new = before.to_flat(), after.to_flat()
    for key in old:
        less = key in NARROWABLE and after.upload.all_extras <= before.upload.all_extras
        moved = key in MOVABLE and (key != "model.weights" or not {old[key], new[key]} & {"none", "timm"})
        if key.startswith(UPLOAD_SETTINGS) and old[key] != new[key] and not (less or moved):
            raise RunError(f"{key} = {new[key]!r}, but the uploads were made with {old[key]!r}; {fix}")


def _sent(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().cpu().to(dtype) if tensor.is_floating_point() else tensor.detach().cpu()


def _report(
    folder: RunFolder, fused: Fused, job: Job, measured: Mapping[str, Any], *, one_of_many: bool
) -> dict[str, Any]:
    """Write pool, pictures and result.json; one of many fusions does not draw who holds what once more."""
    config, uploads = job.config, job.uploads
    classes, facts = _data_facts(folder, uploads, draws=not one_of_many)
    if fused.pool is not None:
        pool = fused.pool
        pool.save(folder.pool_path)
        save_images(pool.images.cpu(), pool.alive.cpu(), pool.targets.cpu(), classes, config.model, folder.images_path)
        facts["synthetic_images"] = len(pool)
    if fused.ensemble is not None:
        facts["teacher_weights"] = _teacher_weights(fused.ensemble, uploads)
    if config.privacy.epsilon:
        facts["epsilon"] = by_client(config, uploads, lambda upload: upload.epsilon)
    if config.upload.sends_statistics:
        facts["bytes_statistics"] = by_client(config, uploads, lambda upload: size(upload.statistics or {}))
    start = size(shapes(config.model))  # what each client got, in float32
    result = report.build(
        config=config,
        device=str(resolve_device(config.device)),
        bytes_up=by_client(config, uploads, lambda upload: upload.num_bytes),
        bytes_down=by_client(config, uploads, lambda _: start),
        client_seconds=by_client(config, uploads, lambda upload: upload.seconds),
        seconds=job.stopwatch.seconds,
        **measured,
        **facts,
    )
    write_result(folder, result)
    return result


def _teacher_weights(ensemble: Ensemble, uploads: Sequence[Upload]) -> dict[str, list[float]]:
    """By client, the weight of its teacher for each class."""
    rows = zip(uploads, ensemble.weights.tolist(), strict=True)
    return {str(upload.client): [round(weight, 4) for weight in row] for upload, row in rows}


def _data_facts(folder: RunFolder, uploads: Sequence[Upload], *, draws: bool) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of the classes, and what is known of everybody's images; perhaps draws who holds what."""
    config = folder.config
    classes = class_names(config)
    facts: dict[str, Any] = {}
    if config.flower.client_names:
        facts["client_names"] = list(config.flower.client_names)
    if config.evaluate.where == "server":
        facts["evaluated_on"] = report.on_server(config.data, len(server_images(config)[0]))
    if config.evaluate.where == "server" and config.partition.scheme != OWN:
        facts |= dealt(config)
    elif all(upload.class_counts for upload in uploads):
        facts["counts"] = by_client(config, uploads, lambda upload: upload.class_counts)
    if draws and config.evaluate.where == "server" and facts.get("counts") and None not in facts["counts"]:
        counts = torch.tensor(facts["counts"])
        save_partition(counts, classes, folder.partition_path)
    return classes, facts


def dealt(config: Config) -> dict[str, Any]:
    """Who holds what, of one data set that the settings deal out; nothing where its training labels cannot be read."""
    parts = known_parts(config)
    return {"counts": parts.counts.tolist(), "partition_sha256": parts.sha256} if parts else {}
