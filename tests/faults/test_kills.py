"""`kill -9` of whatever is there while 200 tasks are under way: nothing is lost, and nothing is done twice."""

import random
import time

from servers import until

from tests.faults.kit import audit, errands, kill

TASKS, CHEATS = 200, 20
CALLS = 3  # a task
KILLS = {"api": 2, "worker": 3, "queue": 3}
SEED = 20261123


def test_two_hundred_tasks_survive_kills_of_everything(deployment, crowd, tell):
    dice = random.Random(SEED)
    victims = [victim for victim, times in KILLS.items() for _ in range(times)]
    dice.shuffle(victims)
    moments = sorted(dice.sample(range(10, TASKS * CALLS - 10), len(victims)))
    todo = errands(TASKS, CHEATS)

    def meanwhile():
        for victim, calls in zip(victims, moments, strict=True):
            crowd.reached(calls)
            time.sleep(dice.uniform(0.0, 0.05))  # so that it falls anywhere, and not only between calls
            strike(deployment, victim, dice)

    crowd.run(todo, meanwhile)
    audit(deployment, todo, crowd)
    tell(f"{TASKS} tasks, {CHEATS} of cheats, while {', '.join(f'{n} x {what}' for what, n in KILLS.items())} died")


def strike(deployment, victim, dice):
    """Kill it; it is started again at once, by the service itself or by whoever runs it."""
    if victim == "api":
        restart(deployment.api)
    elif deployment.redis and victim == "queue":
        restart(deployment.redis)
    elif deployment.redis:
        restart(dice.choice(deployment.workers))
    else:
        wanted = {"worker": "assay work", "queue": "verifier.valkey"}[victim]
        until(lambda: bool(deployment.children(wanted)), f"the service does not start its {victim} again")
        kill(dice.choice(deployment.children(wanted)))


def restart(process):
    process.kill()
    process.start()
