"""The schedules by name.  One of your own needs no entry: docs/pipelines.md shows how."""

from collections.abc import Mapping

from megalina.step.pipeline.schedules import dualpipev, gpipe, greedy, interleaved, one_f_one_b, zb_h1, zbv
from megalina.step.pipeline.schedules.schedule import Schedule

SCHEDULES: Mapping[str, Schedule] = {
    module.SCHEDULE.name: module.SCHEDULE for module in (gpipe, one_f_one_b, interleaved, zb_h1, zbv, dualpipev, greedy)
}
