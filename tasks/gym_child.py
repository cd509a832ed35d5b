"""What is an answer worth, by reasoning-gym's own scorers? grader.py runs this file in its children, as some of these
scorers evaluate the model's text."""

import base64
import pickle

from tasks.answers import serve


def prepare():
    from reasoning_gym import create_dataset

    made = {}  # a data set for each task and its settings: it has the scorer

    def score(gold: str, answer: str) -> str:
        """gold: settings and entry, as `packed` in gym.py makes text of them."""
        settings, entry = pickle.loads(base64.b64decode(gold))
        name = entry["metadata"]["source_dataset"]
        key = f"{name} {settings}"
        try:
            if key not in made:
                made[key] = create_dataset(name, **settings)
            return str(float(made[key].score_answer(answer, entry)))
        except Exception:  # a scorer that chokes on the model's text
            return "0.0"

    return score


if __name__ == "__main__":
    serve(prepare)
