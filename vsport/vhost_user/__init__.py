"""The vhost-user back end: message syntax (message), what the messages mean (session), the socket (server)."""
