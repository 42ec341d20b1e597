from snakemake.utils import min_version

min_version("9.20")


include: "workflow/rules/common.smk"
include: "workflow/rules/stop.smk"
include: "workflow/rules/prepare.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/versions.smk"
include: "workflow/rules/record.smk"


report: "workflow/report/workflow.rst"


localrules:
    all,
    record,


onstart:
    watch_signals()
    begin()


onerror:
    end_if_stopped()
    print(
        f"Some jobs failed: what each says is above and in logs/{RUN}/. The others are kept, and the same command continues from there."
    )


rule all:
    default_target: True
    input:
        jobs.outputs(LAYOUT, jobs.Job("report")).values(),
        RECORDED if RECORD else [],
