from snakemake.utils import min_version

min_version("9.20")


include: "workflow/rules/common.smk"
include: "workflow/rules/stop.smk"
include: "workflow/rules/prepare.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/record.smk"


report: "workflow/report/workflow.rst"


localrules:
    all,
    record,


# DVC is told what is in use meanwhile.
onstart:
    hear_everything()
    if RECORD:
        dvc_results.announce(*IN_USE)


onsuccess:
    if RECORD:
        dvc_results.release(*IN_USE)


onerror:
    if RECORD:
        dvc_results.release(*IN_USE)
    end_if_stopped()
    print(
        f"Some jobs failed: what each says is above and in {LOGS}/. The others are kept, and the same command goes on from there."
    )


rule all:
    default_target: True
    input:
        REPORT.values(),
        RECORDED if RECORD else [],
