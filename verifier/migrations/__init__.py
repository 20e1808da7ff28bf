"""How the tables of a record came to be, a file a version; Database.migrate runs what is missing."""
