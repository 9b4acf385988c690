"""What keeps a home running and whole: servers, their supervisor, runs to be ended or set right, room, backups."""
