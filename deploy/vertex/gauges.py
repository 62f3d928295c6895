"""Whether an app's server has the gauges that the settings scale by."""

from deploy.common.paths import UserError
from deploy.vertex.config import VLLM_TARGETS, VertexSettings
from handler.config import app_yaml

SWITCH = "app.metrics.vllm_names"


def check_gauges(settings: VertexSettings, app: str) -> None:
    """Reject a target of a gauge that the app's server does not have.

    Without the gauge Vertex AI has nothing to compare the target with, and would not say so. A
    server that `command` starts is not checked.

    Raises:
        UserError: it names the target, the switch and its file.
    """
    given = [name for name in VLLM_TARGETS if name in settings.targets]
    if not given or settings.command:
        return
    _, section, switch = SWITCH.split(".")
    if not app_yaml(app, local=True)["app"].get(section, {}).get(switch):
        raise UserError(
            f"{given[0]}: {settings.targets[given[0]]} given, and {SWITCH} is off in "
            f"handler/apps/{app}.yaml, so the server does not have this gauge: switch it on and "
            "build the image again, or leave the target empty"
        )
