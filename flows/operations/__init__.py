"""What keeps a home running and whole: its servers, their supervisor, runs that are to be ended or set right, room and backups."""
