"""The processes of a job: started, watched, ended, started again."""
