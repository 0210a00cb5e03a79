"""Plays a trained actor: prints the returns of some episodes and films the first.

python recipes/enjoy.py RUN_DIR

RUN_DIR is the folder of a run or of a saved actor. An actor that balances a pendulum comes with the recipes:

python recipes/enjoy.py recipes/pretrained/inverted_pendulum
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from qsm_rl import training as rl


def actor_folder(run_dir: Path) -> Path:
    """The folder with the actor's two files."""
    for folder in (run_dir / "actor", run_dir):
        if (folder / "model.safetensors").is_file():
            return folder
    raise rl.UserError(
        f"{run_dir} contains no actor (no actor/model.safetensors): a run saves it when it ends or is stopped with "
        "Ctrl-C."
    )


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run or of a saved actor")
    parser.add_argument("--episodes", type=int, default=10, help="episodes to play (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of environment and policy (default: 0)")
    parser.add_argument(
        "--deterministic", action="store_true", help="follow the policy's mean from zero noise instead of sampling"
    )
    parser.add_argument("--video", type=Path, help="mp4 file for the first episode (default: RUN_DIR/videos/enjoy.mp4)")
    parser.add_argument("--no_video", action="store_true", help="only print the returns")
    given = parser.parse_args(arguments)
    if given.episodes < 1:
        raise rl.UserError(f"--episodes must be at least 1, got {given.episodes}.")
    if not 0 <= given.seed < 2**32:
        raise rl.UserError(f"--seed must be from 0 to 4294967295, got {given.seed}.")
    if given.video is not None and given.video.suffix != ".mp4":
        raise rl.UserError(f"--video must end in .mp4, got {given.video}.")

    # The actor, and the environment that its files name.
    folder = actor_folder(given.run_dir)
    actor = rl.load_actor(folder)
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "env" not in about:
        raise rl.UserError(f"{folder}/config.json does not name the environment; save the actor with publish_actor.")
    make = partial(rl.make_environment, about["env"], action_repeat=about.get("action_repeat", 1))

    # A renderer, if there is one.
    filmed = not given.no_video
    if filmed:
        try:
            with rl.user_errors(ValueError, ImportError):
                rl.check_filming(about["env"], make)
        except rl.UserError as error:
            print(error)
            filmed = False

    # Episodes.
    print(f"{about['env']}, {folder}, {'deterministic' if given.deterministic else 'sampling'}", flush=True)
    with rl.user_errors(ValueError, ImportError):
        environment = make(seed=given.seed, filmed=filmed)
    video = given.video or given.run_dir / "videos" / "enjoy.mp4"
    with rl.Film(video, environment) if filmed else nullcontext() as film:
        result = rl.evaluate_policy(
            environment, actor, episodes=given.episodes, seed=given.seed, deterministic=given.deterministic, film=film
        )
    for number, (episode_return, length) in enumerate(zip(result.returns, result.lengths, strict=True), 1):
        print(f"episode {number}: return {episode_return:.1f}, {length:,} frames")
    mean, spread, count = statistics.fmean(result.returns), statistics.pstdev(result.returns), len(result.returns)
    print(f"return: mean {mean:.1f}, standard deviation {spread:.1f} over {count} episode{'s' * (count > 1)}")
    if filmed:
        print(f"video of episode 1: {video}")
    return 0


if __name__ == "__main__":
    main()
