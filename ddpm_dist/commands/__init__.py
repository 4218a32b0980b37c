"""What a person types, one module a command: arguments to orders, and answers to words.

launch/, tools/ and the console scripts only call these. A command never does the work itself, and no room below
knows one.
"""
