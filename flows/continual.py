"""continual: train the champion on with what is new in the sources; promote who learned it and forgot nothing."""

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.rounds import close, standing
from flows.session import open_run, recorded
from flows.start import open_chain
from gptcore.artifacts import Store, home_folder
from gptcore.config import PipelineConfig
from tasks.continual import FIRST, Continued, find_champion


@flow(name="continual", flow_run_name="{config.name}")
def continual(config: PipelineConfig) -> State[Continued]:
    """A round: only what is new is prepared, encoded and trained on. Without a champion it is the whole pipeline."""
    store = Store(home_folder())
    with recorded(store.home, config.name):
        champion = find_champion(store, config)
        done = standing(config, champion) if champion is not None else None
    if done is None:
        with open_run(config) as run:
            if champion is not None:
                done = close(run, config, champion)
            else:
                done = Continued(
                    FIRST, "there was no champion yet, so the whole pipeline ran", open_chain(run, config).promote()
                )
    return Completed(name=done.state, message=done.said, data=done)


def run_continual(config: PipelineConfig) -> Continued:
    """Run the flow and open the state that it ends in."""
    ended = continual(config)
    continued: Continued = ended.result() if isinstance(ended, State) else ended
    return continued
