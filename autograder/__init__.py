"""The grader: runs a submission apart, asks it questions, and keeps the verdict outside the student's process."""
