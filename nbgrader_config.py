"""nbgrader's settings for this course. The ordinary commands work unchanged; autograding is the trusted grader's."""

import warnings

# nbgrader's own queries make newer SQLAlchemy releases warn on every submission; nothing is wrong.
warnings.filterwarnings("ignore", message="Object of type <Submitted.*> not in session")

c = get_config()  # noqa: F821  (nbgrader defines it)

c.CourseDirectory.course_id = "diffusion-sampling"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "labs"

c.ClearSolutions.code_stub = {"python": 'raise NotImplementedError("TODO: write this method")'}
# A cell may hold several exercises' worth of given code, so a solution region is not required in every one.
c.ClearSolutions.enforce_metadata = False

c.BaseConverter.pre_convert_hook = "autograder.nbgrader_plugin.wait_for_gradebook"

c.Autograde.exporter_class = "autograder.nbgrader_plugin.SubmissionExporter"
c.OverwriteCells.add_missing_cells = True
c.Autograde.sanitize_preprocessors = [
    "autograder.nbgrader_plugin.NotebookHygiene",
    "nbgrader.preprocessors.OverwriteKernelspec",
    "nbgrader.preprocessors.OverwriteCells",
    "nbgrader.preprocessors.CheckCellMetadata",
]
# In the place of nbgrader's Execute, which would run the student's code beside the checks that judge it.
c.Autograde.autograde_preprocessors = [
    "autograder.nbgrader_plugin.TrustedGrading",
    "nbgrader.preprocessors.SaveAutoGrades",
    "nbgrader.preprocessors.AssignLatePenalties",
    "nbgrader.preprocessors.CheckCellMetadata",
]

c.GenerateFeedback.exporter_class = "autograder.feedback.FeedbackExporter"
c.GenerateFeedback.preprocessors = [
    "autograder.nbgrader_plugin.FeedbackGrades",
    "nbconvert.preprocessors.CSSHTMLHeaderPreprocessor",
]
