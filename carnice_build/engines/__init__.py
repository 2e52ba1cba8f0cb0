"""Built folders in the engines that serve them: started, asked as clients ask, ended.

`engine` says how an engine is started for a folder, `forced` what this machine cannot do of the
folder's own launch, `interpreter` where the engine is installed and `server` runs it; `client`
asks, and `questions` counts what is right.
`check` makes the check `engine` of it all.
Engines are never imported here.
"""
