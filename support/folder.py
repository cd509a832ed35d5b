"""The folder of a run, when it begins and when it ends."""

import contextlib
from pathlib import Path

from support import checkpoint, lives, log, plot, ranks


def is_done(run) -> bool:
    return run.step >= run.cfg.steps or 0 < run.cfg.max_rollouts <= run.rollouts


def begin(run, settings: dict) -> None:
    """Makes the run's folder its own, writes config.json into it, and opens the mirrors."""
    claimed = checkpoint.claim(run.folder, run.cfg) if ranks.is_main() else ""
    run.folder = Path(ranks.from_main(str(claimed)))
    if not ranks.is_main():
        return
    log.write_settings(run.folder / "config.json", settings)
    run.gauge.file = run.folder / lives.FILE
    if not run.step:
        run.gauge.file.unlink(missing_ok=True)  # of a run that was stopped before its first checkpoint
    run.mirror.start(run.folder, settings, run.step)
    where = f"run folder: {run.folder}"
    if run.step:
        going = "nothing left to do" if is_done(run) else "going on"
        where += f", {going} after step {run.step}"
    print(where)


@contextlib.contextmanager
def kept(run):
    """Adds to an error that ends the run from where it can go on, if it has saved anything."""
    try:
        yield
    except Exception as error:
        if checkpoint.newest(run.folder) and "--resume" not in str(error):
            error.add_note(f"what is saved stays: mend it, and go on with --resume --out {run.folder}")
        raise
    except KeyboardInterrupt as error:
        error.add_note(f"what is saved stays: go on with --resume --out {run.folder}")
        raise


def end(run, ended_by: int) -> None:
    """Writes the model and says what the run came to, or, where signal `ended_by` ended it, how to go on."""
    if not ended_by:
        checkpoint.export(run)
    if ranks.is_main():
        if ended_by:
            print(f"saved after step {run.step}; go on with --resume --out {run.folder}")
        else:
            rows = plot.read(run.folder / "metrics.jsonl")
            print(log.summary(rows, log.evaluated_on(run.cfg)))
            print(f"model: {run.folder / 'model'}, figures: {' and '.join(map(str, lives.figures(run.folder)))}")
    run.mirror.close()
